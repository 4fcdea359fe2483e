"""Tables fit 80 columns, whatever the ids, and no id is cut; programs are told the same as JSON."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lorry.auditing import print_audit
from lorry.billing import Asked, print_usage
from lorry.checkpoints import print_checkpoints
from lorry.cli import app
from lorry.doctor import Finding
from lorry.jobs import print_jobs
from lorry.limiting import print_limits
from lorry.plan import AdapterTaken, PassTaken, Plan, print_plan
from lorry.reports import print_findings, print_status
from lorry.runs import print_runs
from lorry.storage.rows import ActorRow, CheckpointRow, CommandRow, ResultRow, RunRow, UsageEntry
from lorry.storage.store import Store
from lorry.tables import narrowed
from lorry.tenancy import print_keys, print_tenants
from lorry.top import frame
from lorry.wire.actor_messages import ActorPing
from lorry.wire.admin_messages import KeyInfo, LimitsInfo, TenantInfo
from lorry.wire.client_messages import CommandArguments
from lorry.wire.codec import encode
from lorry.wire.errors import NotFoundError
from lorry.wire.ids import ActorId, FutureId, KeyId, LaneId, RunId, TenantId
from lorry.wire.limits import SCOPES, Limits
from lorry.wire.overview import ActorLoad, Job, Jobs, Overview, QueueLoad
from lorry.wire.types import DEFAULT_PROJECT, AuditEvent, LoraConfig
from tests.conftest import BASE_MODEL

TENANT = TenantId("t." * 32)
RUN = RunId("session-0123456789abcdef:train:12")
FUTURE = FutureId(f"{RUN}:1234")
MODEL = "Qwen/Qwen3-235B-A22B-Instruct-2507"
PATH = f"tinker://{RUN}/sampler_weights/{'name-' * 25}"
KEY = KeyId("key-0123456789ab")
ACTOR = ActorId(f"{MODEL}#0")
LORA = LoraConfig(rank=128, seed=0)
NOW = time.time()
REASON = f"{RUN} goes on with request 1200, which has not arrived"
OF = (FUTURE, TENANT, DEFAULT_PROJECT, LaneId(RUN), RUN, MODEL)
JOB = Job(*OF, "forward_backward", 1_234_567, NOW, "paused_rate_limit", REASON)


def checkpoint(folder: str = "folder") -> CheckpointRow:
    return CheckpointRow(PATH, RUN, TENANT, "external", "n", folder, 1, 2**40, "", NOW, NOW + 1e6, public=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """With one of everything that has a long name."""
    with closing(Store(tmp_path)) as store, store.transaction():
        store.actor_started(ActorRow(ACTOR, MODEL, 1, "cuda:7", "bfloat16", 1024, 0.25, "stopped", NOW - 1e6))
        store.actor_measured(ACTOR, ActorPing(train_s=123456.7, sample_s=98765.4, swaps=1234567))
        store.tenant_made(TENANT, NOW)
        store.run_created(RunRow(RUN, TENANT, "nonce", MODEL, LORA, {}, NOW, NOW, "folder", 1234567, replay_s=1234.5))
        for seq, kind in enumerate(("forward_backward", "save_weights_for_sampler")):
            future = FutureId(f"{RUN}:{seq}")
            row = CommandRow(future, LaneId(RUN), seq, kind, TENANT, MODEL, 123456, 1, CommandArguments())
            store.command_accepted(row, b"", b"", NOW)
        error = encode(NotFoundError(f"there is no checkpoint {PATH!r}", field="path").info)
        entry = UsageEntry(future, "cached_prefill", TENANT, RUN, MODEL, 123_456_789, 10**6, 10**16)
        store.command_finished(ResultRow(future, error, None), "failed", None, [entry], NOW)
        store.audited(AuditEvent(NOW, TENANT, KEY, "checkpoint_expiry_set", PATH, {"expires": "in 3600 s"}))
        store.checkpoint_saved(checkpoint())
    return tmp_path


def limits() -> list[LimitsInfo]:
    said = Limits(2**50, 128, 2**50, 1e6, 2**50, 2**50, 1e9, [MODEL, "another"])
    return [LimitsInfo(f"tenant:{TENANT}", said), LimitsInfo(f"key:{KEY}", said)]


def plan() -> Plan:
    adapters = [AdapterTaken("everything, independent experts", 64, 10**12, 10**12)]
    return Plan(
        MODEL, 10**12, {"bfloat16": 10**12}, 10**6, "MoreExperts", [PassTaken(32768, 10**12, 10**11)], adapters, None
    )


def overview() -> Overview:
    actor = ActorLoad(ACTOR, MODEL, "cuda:7", "bfloat16", 1.0, False, 1024, 2**40, 2**20, 1e6, 1e6, 10**7, NOW)
    queue = QueueLoad(TENANT, MODEL, "save_weights_for_sampler", 10**6, 10**9)
    return Overview(NOW, 1.0, [actor], [MODEL], 10**6, 10**9, [queue] * 3, {"cached_prefill": 10**12}, [JOB], REASON)


def run_row(data: Path) -> Mapping[str, Any]:
    from lorry.storage.reports import recent_runs

    with closing(Store(data)) as store:
        (row,) = recent_runs(store)
    return row | {"home": ACTOR}


TABLES: dict[str, tuple[Callable[[Console, Path], None], tuple[str, ...]]] = {
    "jobs": (lambda to, _: print_jobs(to, Jobs(NOW, 1, [JOB])), (FUTURE, TENANT, MODEL, REASON.replace(" ", ""))),
    "runs": (lambda to, data: print_runs(to, [run_row(data)]), (RUN, TENANT, MODEL, ACTOR)),
    "checkpoints": (lambda to, _: print_checkpoints(to, [checkpoint()]), (PATH, TENANT)),
    "status": (lambda to, data: print_status(to, data), (RUN, TENANT, MODEL, ACTOR, f"{RUN}:1")),
    "tenants": (lambda to, _: print_tenants(to, [TenantInfo(TENANT, 1e6, 9999, NOW, NOW)]), (TENANT,)),
    "keys": (
        lambda to, _: print_keys(to, [KeyInfo(KEY, TENANT, "name " * 25, list(SCOPES), NOW, NOW, NOW, NOW)]),
        (KEY, TENANT),
    ),
    "limits": (lambda to, _: print_limits(to, limits()), (f"tenant:{TENANT}", f"key:{KEY}", MODEL)),
    "usage": (lambda to, data: print_usage(to, data, Asked()), (TENANT, RUN, MODEL)),
    "audit": (
        lambda to, _: print_audit(to, [AuditEvent(NOW, TENANT, KEY, "checkpoint_expiry_set", PATH, {"expires": "x"})]),
        (TENANT, KEY, PATH),
    ),
    "doctor": (lambda to, _: print_findings(to, [Finding(f"{RUN}/training/n.1", PATH, "do that " * 20)]), (PATH, RUN)),
    "top": (lambda to, _: to.print(frame(overview(), [], 80)), (FUTURE, TENANT, MODEL, ACTOR)),
    "plan": (lambda to, _: print_plan(to, plan()), (MODEL,)),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_eighty_columns_and_cuts_no_id(name: str, data: Path) -> None:
    show, ids = TABLES[name]
    output = StringIO()
    show(Console(file=output, width=80, emoji=False, markup=False, highlight=False), data)
    lines = output.getvalue().splitlines()
    assert {len(line) for line in lines if len(line) > 80} == set(), output.getvalue()
    assert {line for line in lines if line[:1] in "┏┃┡│├└" and line[-1] not in "┓┃┩│┤┘"} == set(), output.getvalue()
    cells = [[cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")] for line in lines]
    widest = max(map(len, cells))
    columns = ["".join(row[i] for row in cells if i < len(row)).replace(" ", "") for i in range(widest)]
    for id_ in ids:
        assert any(id_ in column for column in [*columns, output.getvalue()]), (id_, output.getvalue())


@pytest.mark.parametrize(("name", "id_"), [("jobs", FUTURE), ("runs", RUN), ("status", RUN), ("keys", KEY)])
def test_an_id_of_the_usual_length_is_in_one_line(name: str, id_: str, data: Path) -> None:
    output = StringIO()
    TABLES[name][0](Console(file=output, width=80, emoji=False, markup=False, highlight=False), data)
    assert any(id_ in line for line in output.getvalue().splitlines())


COMMANDS = (
    "status",
    "jobs",
    "runs",
    "checkpoints ls",
    "tenants ls",
    "keys ls",
    "limits ls",
    "usage",
    "audit",
    "doctor",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_programs_are_told_the_same_as_json(command: str, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if command == "doctor":
        with pytest.raises(SystemExit):  # for the folders that are not there
            app(["doctor", "--json", "--data", str(data)], standalone_mode=False)
    else:
        app([*command.split(), "--json", "--data", str(data)], standalone_mode=False)
    json.loads(capfd.readouterr().out)


def test_so_are_those_who_plan(capfd: pytest.CaptureFixture[str]) -> None:
    app(["plan", str(BASE_MODEL), "--gpu-memory", "8", "--json"], standalone_mode=False)
    found = json.loads(capfd.readouterr().out)
    assert found["weights_bytes"]["float32"] == 4 * found["parameters"]
    assert "--slots" in found["verdict"]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=9), st.integers(9, 200))
def test_the_widest_column_gives_way_first_and_none_below_its_floor_while_another_can(
    columns: list[tuple[int, int]], room: int
) -> None:
    widths, floors = [list(each) for each in zip(*columns, strict=True)]
    found = narrowed(widths, floors, room)
    assert sum(found) <= max(room, len(columns))
    assert all(1 <= new <= old for new, old in zip(found, widths, strict=True))
    if sum(widths) <= room:
        assert found == widths
    if sum(map(min, widths, floors)) <= room:
        assert all(new >= min(old, floor) for new, old, floor in zip(found, widths, floors, strict=True))
