"""What somebody meets who has read nothing: no arguments, typing errors, and a model to begin with."""

import os
import pty
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorry
from lorry.cli import app
from lorry.config import ModelConfig, demo_model
from lorry.wire.errors import InvalidRequestError
from tests.conftest import LORRY, MODEL


def test_versions_are_told_without_torch() -> None:
    told = CliRunner().invoke(app, ["--version"])
    assert told.exit_code == 0
    assert told.output.splitlines()[0] == f"lorry {version('lorry')}"
    assert f"torch {version('torch')}" in told.output and f"transformers {version('transformers')}" in told.output
    ask = "import sys; sys.argv[1:] = ['--version']; from lorry.cli import app; app(standalone_mode=False); "
    ended = subprocess.run([sys.executable, "-c", ask + "assert 'torch' not in sys.modules"], check=False)
    assert ended.returncode == 0


def test_a_typing_error_is_told_what_was_meant() -> None:
    told = CliRunner().invoke(app, ["srve"])
    assert told.exit_code == 2 and "Did you mean 'serve'" in told.output
    told = CliRunner().invoke(app, ["keys", "crate"])
    assert told.exit_code == 2 and "Did you mean 'create'" in told.output


@pytest.mark.parametrize("words", [[], ["keys"], ["checkpoints"]])
def test_a_group_alone_lists_its_commands(words: list[str]) -> None:
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 2 and "Commands" in told.output


def test_a_script_that_names_no_model_is_told_how_and_ended() -> None:
    told = CliRunner().invoke(app, ["serve"])
    assert told.exit_code == 2
    for word in ("--model ./my-model", "Qwen/Qwen3-0.6B", "small=", "lorry serve --demo"):
        assert word in told.output


def test_somebody_at_a_terminal_is_asked_and_serves_the_demos_model_with_a_key_to_begin_with(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*LORRY, "--log-level", "warning", "serve", "--data", str(tmp_path), "--bind", "tcp://127.0.0.1:*"]
    environment = os.environ | {"COLUMNS": "200"}
    with subprocess.Popen(
        [*command, "--no-http"], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        asked = b""
        while b"[Y/n]" not in asked:
            asked += os.read(ours, 4096)
        os.write(ours, b"y\n")
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    os.close(theirs)
    os.close(ours)
    assert lines[0].lstrip().startswith(f"Serving {MODEL} at tcp://127.0.0.1:")
    assert "Administrator's key" in lines[1]
    assert re.match(r"Key of tenant demo, shown this once: tml-\S+$", lines[2])


async def test_the_embedded_service_has_a_model_to_begin_with() -> None:
    assert demo_model().name == MODEL
    async with lorry.local(project="first") as service:
        training = await service.create_lora_training_client_async(MODEL, rank=2)
        assert (await training.get_info_async()).model_id == training.model_id
        (run,) = await service.create_rest_client().list_training_runs_async(project="first")
        assert run.training_run_id == training.model_id


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("./nowhere", "a folder that exists"),
        ("name=./nowhere", "a folder that exists"),
        ("models/small/of-mine", "a folder that exists"),
        ("{empty}", "a folder with a config.json"),
        ("name={empty}", "a folder with a config.json"),
        ("name=", "NAME=PATH_OR_HUB_ID"),
    ],
)
def test_a_model_that_cannot_be_one_is_refused_before_anything_starts(said: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=expected):
        ModelConfig.parse(said.format(empty=tmp_path)).check_there()
    ModelConfig.parse("org/model").check_there()
    assert ModelConfig.parse("org/model") == ModelConfig("org/model", "org/model")
