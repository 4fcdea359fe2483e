"""A broker, an actor and a gateway, each started by itself as on several machines, with networks in between."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TypeAlias

from tests.conftest import BASE_MODEL, MODEL

TOKEN = {"LORRY_ACTOR_TOKEN": "parts"}


@dataclass(frozen=True, slots=True)
class Part:
    process: "subprocess.Popen[str]"
    announced: dict[str, str]


Started: TypeAlias = AbstractContextManager[Part]


@contextmanager
def part(*arguments: str) -> Iterator[Part]:
    """`lorry ARGUMENTS`, which is ready when this begins."""
    command = [sys.executable, "-m", "lorry", "--log-level", "warning", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | TOKEN) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"{arguments[0]} ended before it was ready"
            yield Part(process, json.loads(line))
        finally:
            process.terminate()


def broker(
    data: Path, heartbeat_s: float, bind: str = "tcp://127.0.0.1:*", actor_bind: str = "tcp://127.0.0.1:*"
) -> Started:
    addresses = ("--bind", bind, "--actor-bind", actor_bind)
    return part("broker", "--model", MODEL, "--data", str(data), *addresses, "--heartbeat-s", str(heartbeat_s))


@contextmanager
def actor(connect: str) -> Iterator[None]:
    """Another one takes its place when it ends, as a supervisor has it: so no test hangs for a machine that is slow."""
    with ThreadPoolExecutor(1) as thread:
        stop = Event()
        keeping = thread.submit(_keep_alive, connect, stop)
        try:
            yield
        finally:
            stop.set()
            keeping.result()


def _keep_alive(connect: str, stop: Event) -> None:
    while not stop.is_set():
        with part("actor", "--model", f"{MODEL}={BASE_MODEL}", "--connect", connect) as actor:
            while actor.process.poll() is None and not stop.wait(0.1):
                pass


def gateway(connect: str, data: Path) -> Started:
    return part("gateway", "--connect", connect, "--http", "127.0.0.1:0", "--data", str(data))
