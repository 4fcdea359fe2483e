"""Every example in the README and in docs/ runs, every link leads somewhere, and every command exists."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from typer.testing import CliRunner

from lorry.cli import app
from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import Server

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[pytest.param]:  # type: ignore[valid-type]
    found = []
    for page in PAGES:
        pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
        for number, block in enumerate(pattern.findall(page.read_text()), 1):
            found.append(pytest.param(block, id=f"{page.name}-{language}-{number}"))
    return found


def commands() -> list[pytest.param]:  # type: ignore[valid-type]
    lines = [line[2:] for block in blocks("console") for line in block.values[0].splitlines() if line.startswith("$ ")]
    return [pytest.param(line, id=line) for line in dict.fromkeys(lines)]


@pytest.fixture(scope="module")
def url(server: Server) -> Iterator[str]:
    """Of a gateway to the same broker."""
    config = GatewayConfig(server.address, port=0)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(running(config)) as url:
        yield url


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_example_runs(code: str, server: Server, new_key: Callable[[], str], url: str) -> None:
    environment = os.environ | {"LORRY_ADDRESS": server.address, "LORRY_API_KEY": new_key(), "LORRY_URL": url}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_runs(command: str, server: Server, tmp_path: Path) -> None:
    """Of make's targets it is enough that they exist: CI runs `make test`, and another test runs the demo. What changes
    who may do what is done to a folder of its own, where alice is."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert words[0] == "lorry"
    arguments = [sys.executable, "-m", *words]
    if words[1] != "serve":
        data = server.data
        if words[1] in ("tenants", "keys", "limits"):
            data = tmp_path
            with closing(Store(data)) as store:
                store.create_key(TenantId("alice"), time.time())
        environment = os.environ | {"LORRY_DATA": str(data)}
        assert subprocess.run(arguments, cwd=ROOT, env=environment, check=True, capture_output=True).stdout
        return
    environment = os.environ | {"LORRY_DATA": str(server.data / "of-the-readme")}
    arguments += ["--bind", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0"]  # other than its own ports may be taken
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("Serving ")
        finally:
            process.terminate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_make_help_lists_every_target() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(targets)


def test_every_subcommand_explains_itself() -> None:
    for words in ([], ["serve"], ["broker"], ["actor"], ["keys", "create"], ["usage"], ["status"]):
        ended = CliRunner().invoke(app, [*words, "--help"])
        assert ended.exit_code == 0 and "Usage" in ended.output
