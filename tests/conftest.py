"""One real server for all tests that only need one: `lorry serve` as a user starts it, in processes of its own.

Nothing here or in a test says how long something may take: the one limit is pytest's, for a test that hangs.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import structlog
from hypothesis import HealthCheck, settings

from lorry.actors.uncollected import uncollected
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.actors.placing import chosen_ranks
from tests.service.raw import Raw

ROOT = Path(__file__).resolve().parent.parent
BASE_MODEL = ROOT / "tests/assets/base-model"
MODEL = "jargon-1m"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ranks", type=int, default=1, help="Among how many processes the models of actors are divided")
    parser.addoption("--device", default="cpu", help="What tests/gpu runs on: cuda, cuda:1, ...")


def pytest_configure(config: pytest.Config) -> None:
    chosen_ranks[0] = config.getoption("--ranks")


settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell that starts the tests in the background has them ignore interrupts, and the servers would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models gain nothing from a second thread, and threads that spin beside another busy process cost tenfold.
os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[str]
    address: str
    data: Path
    first_line: str
    url: str = ""

    def new_key(self, tenant: str) -> str:
        store = Store(self.data)
        try:
            return store.create_key(TenantId(tenant), time.time())
        finally:
            store.close()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        with self.process:
            return self.process.wait()


Start = Callable[..., Server]
"""Starts a server with these options."""

LORRY = (sys.executable, "-m", "lorry")


def start_server(
    data: Path,
    *options: str,
    model: str = f"{MODEL}={BASE_MODEL}",
    command: Sequence[str] = LORRY,
    folder: Path | None = None,
) -> Server:
    """`command` is how `lorry` is called, and `folder` the working directory in which it is."""
    command = [*command, "--log-level", "warning", "serve", "--model", model]
    command += ["--data", str(data), *([] if "--bind" in options else ["--bind", "tcp://127.0.0.1:*"]), *options]
    command += [] if "--http" in options else ["--no-http"]
    # Whoever is silent for three heartbeats is taken for dead, which on a busy machine must not happen to the living.
    command += [] if "--heartbeat-s" in options else ["--heartbeat-s", "60"]
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    assert process.stdout is not None
    line = process.stdout.readline()
    if "Serving" not in line:
        process.kill()
        raise AssertionError(f"lorry serve said {line!r}")
    address = line.split(" at ")[1].split(",")[0]
    url = process.stdout.readline().strip().rpartition("=")[2] if "--http" in options else ""
    return Server(process, address, data, line, url)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Each worker imports what an actor does, and the SDK."""
    with uncollected():
        return (yield)


@pytest.fixture(autouse=True)
def logs_of_its_own() -> Iterator[None]:
    """A command that a test runs in this process sends logs to a stream that is closed after it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() in (0, 130)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers of a test's own, one after the other on the same data, and stops them at its end."""
    started: list[Server] = []

    def start(*options: str) -> Server:
        started.append(start_server(tmp_path / "data", *options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with Raw.connected(server.address) as raw:
        yield raw


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each folder took, of all workers together: CONTRIBUTING.md says what it may take."""
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[os.path.dirname(report.nodeid.partition("::")[0])] += report.duration
    terminalreporter.write_line(", ".join(f"{folder} {took:.0f} s" for folder, took in seconds.most_common()))


_tenants = itertools.count()


@pytest.fixture
def new_key(server: Server) -> Callable[[], str]:
    """A key of a tenant that no other test has."""
    return lambda: server.new_key(f"tenant-{next(_tenants)}")


def children_of(process: int) -> dict[str, int]:
    """The names and process ids of a supervisor's children, as they call themselves on their command lines."""
    found: dict[str, int] = {}
    for child in psutil.Process(process).children():
        words = child.cmdline()
        role = next((word for word in words if word in ("broker", "actor", "gateway")), "")
        if role:
            found[role] = child.pid
    return found


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    """Its actor does nothing meanwhile, so that what it is to do has not been done."""
    actor = children_of(server.process.pid)["actor"]
    os.kill(actor, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(actor, signal.SIGCONT)
