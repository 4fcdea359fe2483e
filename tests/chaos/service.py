"""A service that is hurt and started again on the same folder and addresses, as an operator's systemd does it."""

import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from threading import Timer

import psutil
from anyio.from_thread import start_blocking_portal

from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import BASE_MODEL, MODEL, ROOT, children_of
from tests.network.cables import Cables, bad_at_connections
from tests.network.messages import bad_at_messages

from .faults import Fault
from .supervisor import CUTS_AFTER, bad

_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
HEARTBEAT_S = "2"


def _free_port() -> int:
    """Below those that a system gives to whoever asks for any: the port of a service that is down stays free."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Service:
    """`tell` gets a line for each thing that is done. Clients go through a bad network to `address`."""

    def __init__(self, data: Path, seed: int, tell: Callable[[str], None]) -> None:
        self.data, self._seed, self._tell = data, seed, tell
        self._door, http = f"tcp://127.0.0.1:{_free_port()}", f"127.0.0.1:{_free_port()}"
        self.url = f"http://{http}"
        self._options = ["--bind", self._door, "--http", http, "--heartbeat-s", HEARTBEAT_S, "--recovery-s", "1"]
        self.family = set[psutil.Process]()
        self._stopped = set[int]()
        self._timers: list[Timer] = []

    def __enter__(self) -> "Service":
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            messages = self._portal.wrap_async_context_manager(bad_at_messages(self._door, bad(self._seed + 2)))
            self._cables = Cables(stack.enter_context(messages), self._seed + 2, CUTS_AFTER)
            network = self._portal.wrap_async_context_manager(bad_at_connections(self._cables))
            self.address = stack.enter_context(network)
            self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            for timer in self._timers:
                timer.cancel()
            self.mend()
            with self._process:
                self._process.terminate()

    def new_key(self, tenant: str) -> str:
        with closing(Store(self.data)) as store:
            return store.create_key(TenantId(tenant), time.time())

    def suffer(self, fault: Fault) -> None:
        if fault.role == "network":
            self._tell(f"{fault.deed} network")
            self._portal.call(self._cables.cut if fault.deed == "cut" else self._cables.swallow)
            return
        if fault.role == "disk":
            self._fill(fault)
            return
        victim = self._process.pid if fault.role == "supervisor" else self._children().get(fault.role)
        if victim is None:
            self._tell(f"{fault.deed} {fault.role}: there is none at the moment")
            return
        self._tell(f"{fault.deed} {fault.role} {victim}")
        if fault.deed in _SIGNALS:
            if fault.role == "supervisor":
                self._resume_all()
            self._send(victim, _SIGNALS[fault.deed])
        else:
            self._stopped.add(victim)
            self._send(victim, signal.SIGSTOP)
            if fault.deed == "stop for a while":
                self._timers.append(Timer(fault.lasts_s, self._send, (victim, signal.SIGCONT)))
                self._timers[-1].start()
        if fault.role == "supervisor" and fault.deed in _SIGNALS:
            self._restart()

    def _fill(self, fault: Fault) -> None:
        """The system refuses what the broker writes to files meanwhile: its journal, as a disk that is full does."""
        if (broker := self._children().get("broker")) is None:
            self._tell("fill disk: there is no broker at the moment")
            return
        self._tell(f"{fault.deed} disk of broker {broker}")
        if self._limit(broker, 0):
            self._timers.append(Timer(fault.lasts_s, self._limit, (broker, resource.RLIM_INFINITY)))
            self._timers[-1].start()

    def _limit(self, broker: int, file_bytes: int) -> bool:
        try:
            resource.prlimit(broker, resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
        except ProcessLookupError:
            return False
        return True

    def mend(self) -> None:
        """Whoever was stopped goes on."""
        self._resume_all()

    def is_up(self) -> bool:
        return self._process.poll() is None

    def _restart(self) -> None:
        """As a service manager does it: once all processes of the former have ended."""
        with self._process:
            self._process.wait()
        psutil.wait_procs(self.family)
        self._tell("supervisor is started again")
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.supervisor", str(self._seed), "--log-level", "warning", "serve"]
        command += ["--model", f"{MODEL}={BASE_MODEL}", "--data", str(self.data), *self._options]
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "log.txt").open("a") as log:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=log, text=True)
        assert self._process.stdout is not None
        if "Serving" not in self._process.stdout.readline():
            with self._process:
                self._process.kill()
            raise AssertionError((self.data / "log.txt").read_text()[-4000:])
        self._children()

    def _children(self) -> dict[str, int]:
        with suppress(psutil.NoSuchProcess):
            self.family.update([psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children()])
            return children_of(self._process.pid)
        return {}

    def _resume_all(self) -> None:
        for process in self._stopped:
            self._send(process, signal.SIGCONT)
        self._stopped.clear()

    def _send(self, process: int, which: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(process, which)
