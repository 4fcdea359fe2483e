"""The least that a broker in Python with a journal can be: what `bench.broker` compares itself with.

One socket, drained whenever there is something; what was drained goes into SQLite in one transaction that is on the
disk before anybody is answered. It plans nothing, knows nobody, and has no actor.
"""

import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import zmq

from lorry.wire.codec import decode, encode

_PAYLOAD = bytes(100)


@dataclass(frozen=True, slots=True)
class Bare:
    per_core_second: float
    alone_ms: list[float]


def measure(database: Path, commands: int, window: int) -> Bare:
    """With `window` commands under way."""
    with _broker(database) as (process, address), zmq.Context() as context:
        socket = context.socket(zmq.DEALER)
        socket.connect(address)
        _work(socket, commands // 10, window)
        times = process.cpu_times()
        _work(socket, commands, window)
        now = process.cpu_times()
        alone_ms = [_one(socket) for _ in range(200)]
        socket.close(linger=0)
    seconds = now.user + now.system - times.user - times.system  # to the hundredth, so take many commands
    return Bare(commands / max(seconds, 0.01), alone_ms)


@contextmanager
def _broker(database: Path) -> Generator[tuple[psutil.Process, str]]:
    command = [sys.executable, "-m", "bench.bare", str(database)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), process.stdout.readline().strip()
        finally:
            process.terminate()


def _work(socket: "zmq.Socket[bytes]", commands: int, window: int) -> None:
    sent = ended = 0
    while ended < commands:
        while sent < min(commands, ended + window):
            socket.send_multipart([encode(sent), _PAYLOAD])
            sent += 1
        socket.recv_multipart()
        ended += 1


def _one(socket: "zmq.Socket[bytes]") -> float:
    started = time.perf_counter()
    _work(socket, 1, 1)
    return 1e3 * (time.perf_counter() - started)


def _serve(database: str) -> None:
    journal = sqlite3.connect(database, isolation_level=None)
    journal.executescript(
        "pragma journal_mode = wal; pragma synchronous = full; create table command (number integer, payload blob)"
    )
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.set_hwm(0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    while True:
        drained = [socket.recv_multipart()]
        while int(socket.EVENTS) & zmq.POLLIN:
            drained.append(socket.recv_multipart())
        journal.execute("begin")
        rows = [(decode(header, int), payload) for _, header, payload in drained]
        journal.executemany("insert into command values (?, ?)", rows)
        journal.execute("commit")
        for client, header, _ in drained:
            socket.send_multipart([client, header])


if __name__ == "__main__":
    _serve(sys.argv[1])
