"""A server that speaks HTTP, and the official SDK in processes of its own."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, Server, start_server

OLD_SDK = ROOT / "build/sdk-0.34.0"
"""`make test` puts it there."""
PRICES = """
storage_usd_per_gb_month = 0.2
["jargon-1m"]
train = 0.44
sample = 0.4
["*"]
train = 100
"""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One who runs scripts, with a key of its own."""

    server: Server
    key: str
    sdk: Path | None = None
    extra: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def environment(self) -> dict[str, str]:
        settings = {"TINKER_BASE_URL": self.server.url, "TINKER_API_KEY": self.key, "TINKER_TELEMETRY": "1"}
        sdk = {"PYTHONPATH": str(self.sdk)} if self.sdk else {}
        return os.environ | settings | sdk | self.extra | {"PYTHONWARNINGS": "ignore"}

    def start(self, program: str, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.gateway.programs", program, *arguments]
        return subprocess.Popen(
            command, env=self.environment, cwd=ROOT, text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE
        )

    def run(self, program: str, *arguments: str) -> dict[str, Any]:
        """What the program printed last. Fails with its errors where it fails."""
        return finish(self.start(program, *arguments))

    def tinker(self, *arguments: str) -> str:
        """What the `tinker` command prints."""
        command = [sys.executable, "-m", "tinker.cli", *arguments]
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def lorry(self, *arguments: str) -> str:
        """What a `lorry` command prints of this server's data."""
        command = [sys.executable, "-m", "lorry", *arguments, "--data", str(self.server.data)]
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=f"{self.server.url}/api/v1", headers={"X-API-Key": self.key}, timeout=None)


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="session")
def http_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("gateway")
    prices = data / "prices.toml"
    prices.write_text(PRICES)
    server = start_server(data, "--http", "127.0.0.1:0", "--prices", str(prices))
    yield server
    assert server.stop() in (0, 130)


_numbers = itertools.count()


@pytest.fixture
def new_tenant(http_server: Server) -> Callable[[], Tenant]:
    return lambda: Tenant(http_server, http_server.new_key(f"user-{next(_numbers)}"))


@pytest.fixture
def tenant(new_tenant: Callable[[], Tenant]) -> Tenant:
    return new_tenant()
