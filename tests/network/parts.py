"""A broker, an actor and a gateway, each started by itself as on several machines, with networks in between."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
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


def actor(connect: str, *options: str) -> Started:
    return part("actor", "--model", f"{MODEL}={BASE_MODEL}", "--connect", connect, *options)


def gateway(connect: str, data: Path) -> Started:
    return part("gateway", "--connect", connect, "--http", "127.0.0.1:0", "--data", str(data))
