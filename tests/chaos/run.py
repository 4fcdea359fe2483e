"""Tenants' loops, again and again, while everything is hurt; then the verdict."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from tests.conftest import start_server
from tests.network.programs import KINDS, Report, Work, finish

from . import verdict
from .faults import Role, schedule
from .service import Service

APIS = ("lorry", "tinker")


@dataclass(frozen=True, slots=True)
class Plan:
    """`faults` or `seconds`, whichever is reached later, end the disturbance. Each tenant repeats a loop of `steps`.
    Restarting the whole service takes long: where time is short, its supervisor is spared."""

    seed: int
    tenants: int
    faults: int = 0
    seconds: float = 0.0
    steps: int = 30
    pause_s: tuple[float, float] = (1.0, 5.0)
    spares_supervisor: bool = False

    @property
    def works(self) -> list[Work]:
        """Half through each client, half of each kind."""
        combinations = itertools.cycle(zip(KINDS + KINDS, APIS + APIS[::-1], strict=True))
        chosen = itertools.islice(combinations, self.tenants)
        return [Work(api, kind, self.steps, 1 + i) for i, (kind, api) in enumerate(chosen)]


def run(plan: Plan, folder: Path, say: Callable[[str], None]) -> list[str]:
    """The findings. `say` gets the log: what was done, and when."""
    begun = time.monotonic()

    def tell(line: str) -> None:
        say(f"{time.monotonic() - begun:7.1f} s  {line}")

    expected = _in_peace(plan, folder / "peace")
    tell(f"the same loops in peace: {sum(len(report.seen) for report in expected)} steps")
    over, failures = Event(), list[str]()
    with ThreadPoolExecutor(plan.tenants) as threads:
        with Service(folder / "data", plan.seed, tell) as service:
            keys = [service.new_key(f"tenant-{i}") for i in range(plan.tenants)]
            loops = [
                threads.submit(_again_and_again, work, key, service, over, tell, failures)
                for work, key in zip(plan.works, keys, strict=True)
            ]
            try:
                _disturb(plan, service)
            finally:
                over.set()
                service.mend()
            tell("peace again: the loops come to their ends")
            found = [loop.result() for loop in loops]
        tell(f"{sum(map(len, found))} loops have ended")
        findings = [
            line
            for work, before, after in zip(plan.works, expected, found, strict=True)
            for report in after
            for line in verdict.of_loop(work, before, report)
        ]
        for i, reports in enumerate(found):
            findings += verdict.of_bill(service.data, f"tenant-{i}", reports)
        findings += [*verdict.of_journal(service.data), *verdict.of_status(service.data)]
        return [*failures, *findings, *verdict.of_processes(service.family)]


def _in_peace(plan: Plan, data: Path) -> list[Report]:
    server = start_server(data, "--http", "127.0.0.1:0")
    try:
        key = server.new_key("peace")
        return [finish(work.start(key, server.address, server.url)) for work in plan.works]
    finally:
        server.stop()


def _again_and_again(
    work: Work, key: str, service: Service, over: Event, tell: Callable[[str], None], failures: list[str]
) -> list[Report]:
    reports: list[Report] = []
    while not over.is_set() or not reports:
        try:
            reports.append(finish(work.start(key, service.address, service.url)))
        except AssertionError as error:
            failures.append(f"{work} ended with {str(error)[-2000:]}")
            break
        tell(f"{work.api} {work.kind}: loop {len(reports)} has ended")
    return reports


def _disturb(plan: Plan, service: Service) -> None:
    until = time.monotonic() + plan.seconds
    spared: frozenset[Role] = frozenset({"supervisor"} if plan.spares_supervisor else ())
    for count, fault in enumerate(schedule(plan.seed, plan.pause_s, spared)):
        if count >= plan.faults and time.monotonic() >= until:
            return
        time.sleep(fault.pause_s)
        service.suffer(fault)
