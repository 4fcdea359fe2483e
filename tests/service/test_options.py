"""An actor's settings are declared once: the command line's options and the supervisor's orders follow from them."""

from collections.abc import Callable
from dataclasses import fields

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from lorry.actors.config import ActorConfig, ActorSettings
from lorry.arguments import arguments_of, option_name
from lorry.cli import app
from lorry.gateway.config import GatewayConfig, HttpSettings

OTHER = ActorSettings(
    device="cuda:1",
    dtype="bfloat16",
    quantize="nf4",
    tensor_parallel=2,
    trust_remote_code=True,
    adapter_layout="tinker",
    slots=3,
    host_memory=2**30,
    recovery_s=5.0,
    idle_save_s=7.0,
    hang_s=9.0,
    token_budget=100,
    pass_bytes=2**21,
    sample_rows=5,
    prefill_chunk=7,
    image_pixels=10_000,
    image_cache_bytes=20_000,
    kv_cache_bytes=2**20,
    sample_share=0.1,
    compile=True,
    threads=2,
)
OTHER_HTTP = HttpSettings(
    tls_cert="cert.pem",
    tls_key="key.pem",
    trusted_proxies="10.0.0.0/8,::1",
    plain_http=True,
    requests_per_key=7,
    http_connections=8,
    connections_per_address=9,
    slow_after_s=1.5,
)
"""No field of either has its default, so that none can be lost unseen."""


JOINS = ("actor", "--model", "a=b", "--connect", "ipc://c")


def exit_status(name: str, *words: str) -> int | str | None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    with pytest.raises(SystemExit) as ended:
        group.commands[name].main(list(words))
    return ended.value.code


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[ActorConfig]:
    """What `lorry actor` would run with."""
    configs: list[ActorConfig] = []

    async def run_actor(config: ActorConfig, supervised: bool) -> None:
        configs.append(config)

    monkeypatch.setattr("lorry.processes.run_actor", run_actor)
    monkeypatch.setenv("LORRY_ACTOR_TOKEN", "token")
    return configs


def test_serve_lists_the_same_options_of_an_actor_and_of_a_gateway_as_these(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "250")

    def listed(name: str) -> dict[str, str]:
        """What help says of each option: its type and bounds, what it is for, and its default."""
        assert exit_status(name, "--help") == 0
        lines = (line.strip("│ ").split() for line in capsys.readouterr().out.splitlines())
        return {words[0]: " ".join(words[1:]) for words in lines if words and words[0].startswith("--")}

    serve, actor = listed("serve"), listed("actor")
    for field, other in (
        *((field, actor) for field in fields(ActorSettings)),
        *((field, listed("gateway")) for field in fields(HttpSettings)),
    ):
        name = option_name(field.name)
        assert serve[name] == other[name]
        if field.default not in (None, False):
            assert f"[default: {field.default}]" in serve[name]


@pytest.mark.parametrize("settings", [ActorSettings(), OTHER], ids=["defaults", "others"])
def test_an_actor_reads_what_the_supervisor_writes(settings: ActorSettings, configured: list[ActorConfig]) -> None:
    assert exit_status(*JOINS, *arguments_of(settings)) == 0
    assert [config.settings for config in configured] == [settings]


@pytest.mark.parametrize("settings", [HttpSettings(), OTHER_HTTP], ids=["defaults", "others"])
def test_a_gateway_reads_what_the_supervisor_writes(settings: HttpSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[GatewayConfig] = []

    async def run_gateway(configured: Callable[[], GatewayConfig], supervised: bool) -> None:
        configs.append(configured())

    monkeypatch.setattr("lorry.processes.run_gateway", run_gateway)
    assert exit_status("gateway", *arguments_of(settings)) == 0
    assert [config.http for config in configs] == [settings]


@pytest.mark.parametrize("other", [OTHER, OTHER_HTTP], ids=["actor", "gateway"])
def test_others_than_the_defaults_are_tried(other: ActorSettings | HttpSettings) -> None:
    assert [field.name for field in fields(other) if getattr(other, field.name) == field.default] == []


@pytest.mark.parametrize("words", [("--slots", "0"), ("--sample-share", "1"), ("--kv-cache-bytes", "0")])
def test_a_setting_out_of_bounds_is_refused(words: tuple[str, str], configured: list[ActorConfig]) -> None:
    assert exit_status(*JOINS, *words) == 2
    assert configured == []
