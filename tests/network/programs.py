"""Loops of `tests.network.loop`, started side by side, and what is to be true when they have ended."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lorry.storage.reports import usage
from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import MODEL, ROOT

Seen: TypeAlias = list[dict[str, Any]]
KINDS = ("supervised", "reinforcement")


@dataclass(frozen=True, slots=True)
class Work:
    """What a tenant's loop does. Two that do the same see the same."""

    api: str
    kind: str
    steps: int
    seed: int = 1

    def start(self, key: str, address: str, url: str) -> "subprocess.Popen[str]":
        where = {"LORRY_ADDRESS": address, "LORRY_API_KEY": key, "TINKER_BASE_URL": url, "TINKER_API_KEY": key}
        command = [sys.executable, "-W", "ignore", "-m", "tests.network.loop", self.api, self.kind, MODEL]
        command += ["--steps", str(self.steps), "--seed", str(self.seed)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | where, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


@dataclass(frozen=True, slots=True)
class Report:
    """What a loop saw at each step, and how many tokens of each kind it sent and got."""

    seen: Seen
    run: str
    sent: Counter[str]


def finish(process: "subprocess.Popen[str]") -> Report:
    """Fails with what the loop wrote where it failed."""
    output, errors = process.communicate()
    assert process.returncode == 0, f"{output}\n{errors[-4000:]}"
    *seen, last = map(json.loads, output.splitlines())
    return Report(seen, last["run"], Counter(last["sent"]))


def sent(reports: Iterable[Report]) -> Counter[str]:
    total = Counter[str]()
    for report in reports:
        total += report.sent
    return total


def billed(data: Path, tenant: str) -> Counter[str]:
    """Tokens by kind. How many of a prompt's were found computed is chance, that they are counted is not."""
    store = Store(data)
    try:
        rows = usage(store, TenantId(tenant))
    finally:
        store.close()
    tokens = Counter[str]()
    for row in rows:
        tokens[row.kind.removeprefix("cached_")] += row.tokens
    return tokens
