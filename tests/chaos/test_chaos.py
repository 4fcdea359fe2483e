"""A minute of chaos with a seed of its own, and faults planted to show that the verdict sees them.

`make chaos` is the same for longer, with more tenants.
"""

import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import lorry
from lorry.storage.connection import FILE
from tests.conftest import MODEL, Server, Start
from tests.network.programs import Report, Work
from tests.service.test_training import datum

from . import verdict
from .faults import schedule
from .run import Plan, run

WORK = Work("lorry", "reinforcement", 2)
PEACE = Report([{"loss": 1.0, "tokens": [[1, 2]]}, {"loss": 0.0, "tokens": [[3, 4]]}], "run-1", Counter(train=24))


def test_a_short_chaos_leaves_no_finding(tmp_path: Path) -> None:
    plan = Plan(seed=4, tenants=2, faults=5, steps=8, pause_s=(0.5, 1.5), spares_supervisor=True)
    log: list[str] = []
    assert run(plan, tmp_path, log.append) == [], "\n".join(log)


def test_a_seed_makes_one_schedule() -> None:
    first, again, other = (list(islice(schedule(seed, (1.0, 2.0)), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(not (a.role == b.role == "actor") for a, b in pairwise(first))


def test_the_verdict_sees_another_loss_another_token_and_a_step_that_is_missing() -> None:
    def findings(*seen: dict[str, object]) -> int:
        return len(list(verdict.of_loop(WORK, PEACE, replace(PEACE, seen=[*seen]))))

    first, second = PEACE.seen
    assert findings(first, second) == 0
    assert findings(first | {"loss": 1.0 + 1e-6}, second) == 0
    assert findings(first | {"loss": 1.0 + 1e-4}, second) == 1
    assert findings(first, second | {"tokens": [[3, 5]]}) == 1
    assert findings(first) == 1


async def test_the_verdict_sees_what_is_billed_twice_unanswered_or_failed(start: Start) -> None:
    server = start()
    async with lorry.connect(server.address, api_key=server.new_key("alice")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        await training.forward_backward([datum()], "cross_entropy")
    report = replace(PEACE, sent=Counter(train=12))
    assert _findings(server, report) == []
    with closing(sqlite3.connect(server.data / FILE)) as database, database:
        database.execute("UPDATE usage SET tokens = 13")
    assert len(_findings(server, report)) == 1
    with closing(sqlite3.connect(server.data / FILE)) as database, database:
        database.execute("UPDATE commands SET state = 'queued'")
    assert len(_findings(server, report)) == 3, "the bill, a future that waits, and what lorry status says of it"


def _findings(server: Server, report: Report) -> list[str]:
    data = server.data
    return [*verdict.of_bill(data, "alice", [report]), *verdict.of_journal(data), *verdict.of_status(data)]
