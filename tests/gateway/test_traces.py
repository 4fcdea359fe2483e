"""A session's timeline, as its owner takes it away, is what the journal says, and nobody else's to see."""

import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorry
from lorry.client.session_trace import SessionTrace
from lorry.storage.store import Store
from lorry.storage.timelines import timeline
from lorry.tracing import write_trace
from lorry.wire.errors import InvalidRequestError, NotFoundError
from lorry.wire.ids import ActorId, FutureId, LaneId, RunId, TenantId
from lorry.wire.timelines import TimedCommand
from tests.scheduler.test_client_door import DATUM, Serving
from tests.storage.test_store import ALICE, RUN, command

from .conftest import Tenant
from .perfetto_file import Slice, slices
from .test_requests import a_pass, a_run
from .trace_processor import asked, needs_trace_processor

COMMANDS = 1000


def micros(at: float) -> int:
    return round(at * 1e6)


def sums(found: list[Slice]) -> dict[str, tuple[int, int]]:
    """How many slices there are of each stage, and how many microseconds they take together."""
    counts, durations = Counter[str](), Counter[str]()
    for each in found:
        assert each.dur is not None and each.dur % 1000 == 0
        counts[each.category] += 1
        durations[each.category] += each.dur // 1000
    return {stage: (count, durations[stage]) for stage, count in counts.items()}


async def test_the_sums_of_a_thousand_commands_are_the_journals(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as alice:
        training = await alice.create_lora_training_client_async("m", rank=4)
        service.may_work.set()
        futures = [training.forward_backward([DATUM], "cross_entropy") for _ in range(COMMANDS - 2)]
        futures += [training.optim_step(lorry.AdamParams()), training.load_state("tinker://x/weights/y")]
        for future in futures[:-1]:
            await future
        with pytest.raises(NotFoundError):
            await futures[-1]
        with (tmp_path / "theirs").open("wb") as file:
            await alice.create_rest_client().export_trace_async(training.model_id, file)
        rows = service.store.rows("SELECT * FROM commands")
    assert len(rows) == COMMANDS
    found = slices((tmp_path / "theirs").read_bytes())
    handed_out = [row for row in rows if row["started_at"] is not None]
    assert len(handed_out) == COMMANDS - 1, "the load was refused"
    queue = sum(micros(row["started_at"] or row["finished_at"]) - micros(row["submitted_at"]) for row in rows)
    executed = sum(micros(row["finished_at"]) - micros(row["started_at"]) for row in handed_out)
    assert sums(found) == {
        "queue": (COMMANDS, queue),
        "execution": (COMMANDS - 1, executed),
        "actor": (COMMANDS - 1, executed),
    }
    (refused,) = [each for each in found if each.args["state"] == "failed"]
    assert (refused.name, refused.args["error"]) == ("load_state", "NotFoundError")
    run = f"run {training.model_id}"
    assert {each.path for each in found} == {
        (training.model_id, run, "queue"),
        (training.model_id, run, "execution"),
        ("actors", "actor scripted"),
    }
    by_request = defaultdict[str, list[Slice]](list)
    for each in found:
        by_request[each.args["request"]].append(each)
    assert {len({flow for each in three for flow in each.flows}) for three in by_request.values()} == {1}
    assert len({each.flows for each in found}) == COMMANDS
    # The operator's is the same, with the service or without it.
    assert write_trace(tmp_path, training.model_id, tmp_path / "ours") == COMMANDS
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(InvalidRequestError, match=r"output is .*ours"):
        write_trace(tmp_path, training.model_id, tmp_path / "ours")
    with pytest.raises(NotFoundError, match="no session or run 'nobodys'"):
        write_trace(tmp_path, "nobodys", tmp_path / "nobodys")


@needs_trace_processor
async def test_perfettos_trace_processor_finds_the_sums_of_the_journal(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as alice:
        training = await alice.create_lora_training_client_async("m", rank=4)
        service.may_work.set()
        for future in [training.forward_backward([DATUM], "cross_entropy") for _ in range(COMMANDS)]:
            await future
        rows = service.store.rows("SELECT * FROM commands")
    assert write_trace(tmp_path, training.model_id, tmp_path / "trace") == COMMANDS
    stages, requests, errors = asked(
        tmp_path / "trace",
        tmp_path,
        "SELECT category AS stage, count(*) AS n, sum(dur) / 1000 AS us, min(dur) AS least FROM slice GROUP BY 1",
        "SELECT count(DISTINCT display_value) AS n FROM args WHERE key = 'debug.request'",
        "SELECT name, value FROM stats WHERE severity IN ('error', 'data_loss') AND value > 0",
    )
    queue = sum(micros(row["started_at"]) - micros(row["submitted_at"]) for row in rows)
    executed = sum(micros(row["finished_at"]) - micros(row["started_at"]) for row in rows)
    found = {row["stage"]: (row["n"], row["us"]) for row in stages}
    assert found == {"queue": (COMMANDS, queue), "execution": (COMMANDS, executed), "actor": (COMMANDS, executed)}
    assert all(row["least"] >= 0 for row in stages), "each has an end"
    assert (requests, errors) == ([{"n": COMMANDS}], [])


def test_a_session_is_told_a_page_at_a_time_and_nothing_twice(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        store.create_key(ALICE, 1.0)
        for session, runs in (("session-a", ("a", "b")), ("session-b", ("c",))):
            for run in runs:
                store.run_created(replace(RUN, id=RunId(run), nonce=run, session=session))
                for seq in range(5):
                    future, lane = FutureId(f"{run}:{seq}"), LaneId(run)
                    store.command_accepted(replace(command(seq), future=future, lane=lane), b"", b"", 1.0)
        told, after = [], None
        while True:
            page = timeline(store, ALICE, "session-a", after, 3)
            told += [command.future for command in page.commands]
            if (after := page.after) is None:
                break
        assert told == [f"{run}:{seq}" for run in "ab" for seq in range(5)]
        assert timeline(store, TenantId("mallory"), "session-a", None).commands == []


TIMES = st.floats(1.7e9, 1.7e9 + 100)


@given(st.lists(st.tuples(TIMES, st.floats(0, 50), st.none() | st.floats(0, 50)), max_size=30))
def test_slices_that_overlap_keep_their_times(tmp_path_factory: pytest.TempPathFactory, times: list) -> None:
    commands = [
        TimedCommand(
            FutureId(f"r:{seq}"), LaneId("r"), "r", "m", seq, "sample", "done", accepted, accepted + waited,
            None if executed is None else accepted + waited + executed, 1, ActorId("a"),
        )
        for seq, (accepted, waited, executed) in enumerate(times)
    ]  # fmt: skip
    file = tmp_path_factory.getbasetemp() / "overlapping"
    with file.open("wb") as written:
        SessionTrace(written, "s").add(commands)
    found = {(each.args["seq"], each.category): each for each in slices(file.read_bytes())}
    for one in commands:
        assert one.started_at is not None
        queued = found[one.seq, "queue"]
        assert queued.ts == micros(one.accepted_at) * 1000
        assert queued.dur == (micros(one.started_at) - micros(one.accepted_at)) * 1000
        if one.finished_at is None:
            assert (one.seq, "execution") not in found
        else:
            executed = found[one.seq, "execution"]
            assert executed.dur == (micros(one.finished_at) - micros(one.started_at)) * 1000


def test_the_sdk_takes_a_session_away_and_its_link_is_for_that_alone(
    new_tenant: Callable[[], Tenant], tmp_path: Path
) -> None:
    tenant, other = new_tenant(), new_tenant()
    with tenant.http() as http, other.http() as others:
        run = a_run(http)
        session = run.partition(":")[0]
        request = http.post("forward_backward", content=a_pass(run, 1)).json()["request_id"]
        while http.post("retrieve_future", json={"request_id": request}).json().get("type") == "try_again":
            pass
        tenant.tinker("session", "export-trace", session, "--output", str(tmp_path / "it.pftrace"))
        stages = {each.category: each for each in slices((tmp_path / "it.pftrace").read_bytes())}
        assert stages.keys() == {"queue", "execution", "actor"}
        executed = stages["execution"]
        assert executed.path == (f"session {session}", f"run {run}", "execution")
        assert executed.args["tokens"] == executed.args["tokens.train"] > 0
        assert 0 < executed.args["device_s"] < executed.dur / 1e9
        url = tenant.tinker("session", "export-trace", session, "--url-only").strip()
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == (tmp_path / "it.pftrace").read_bytes()
        another = url.replace(session, others.post("create_session", json={"tags": [], "user_metadata": None,
                                                   "sdk_version": "0"}).json()["session_id"])  # fmt: skip
        assert http.get(another).status_code == 404
        assert others.get(f"sessions/{session}/trace_export").status_code == 404
        assert oct((tenant.server.data / "traces").stat().st_mode)[-3:] == "700"
