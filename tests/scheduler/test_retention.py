"""How long checkpoints are kept where nothing was said, how many, and how many go at once."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorry
from lorry.client.operator import administer
from lorry.scheduler.choosing import chosen
from lorry.storage.rows import CheckpointRow
from lorry.wire.admin_messages import SetLimits
from lorry.wire.catalogue_messages import CheckpointFilter, PublishCheckpoint
from lorry.wire.errors import InvalidRequestError, LimitReachedError, NotFoundError
from lorry.wire.ids import ProjectId, RunId, TenantId
from lorry.wire.limits import Limits
from lorry.wire.types import Checkpoint

from .test_client_door import Serving

SOME = st.lists(
    st.builds(
        lambda run, kind, seq, at, public, note: CheckpointRow(
            f"tinker://{run}/{kind}/{seq}",
            RunId(run),
            TenantId("alice"),
            kind,
            str(seq),
            "f",
            seq,
            1,
            "",
            float(at),
            None,
            public,
            user_metadata={"note": note},
        ),
        st.sampled_from(["run-1", "run-2"]),
        st.sampled_from(["training", "sampler"]),
        st.integers(0, 50),
        st.integers(0, 20),
        st.booleans(),
        st.sampled_from(["a", "b"]),
    ),
    max_size=20,
    unique_by=lambda row: row.path,
)
FILTERS = st.builds(
    CheckpointFilter,
    run=st.sampled_from([None, "run-1"]),
    project=st.sampled_from([None, ProjectId("of run-2")]),
    kind=st.sampled_from([None, "sampler"]),
    older_than_s=st.sampled_from([None, 5.0]),
    user_metadata=st.sampled_from([{}, {"note": "a"}]),
    but_newest=st.sampled_from([None, 0, 2]),
    public=st.booleans(),
)


@given(SOME, FILTERS)
def test_a_filter_means_what_has_all_that_it_says(rows: list[CheckpointRow], wanted: CheckpointFilter) -> None:
    found = chosen(rows, wanted, lambda run: ProjectId(f"of {run}"), 20.0)
    for row in rows:
        newer = [r for r in rows if (r.run, r.kind) == (row.run, row.kind)]
        newer = [r for r in newer if (r.created_at, r.seq) > (row.created_at, row.seq)]
        same_age = [
            r for r in rows if (r.run, r.kind, r.created_at, r.seq) == (row.run, row.kind, row.created_at, row.seq)
        ]
        assert same_age == [row]
        is_meant = (
            (wanted.public or not row.public)
            and (wanted.run is None or row.run == wanted.run)
            and (wanted.project is None or f"of {row.run}" == wanted.project)
            and (wanted.kind is None or row.kind == wanted.kind)
            and (wanted.older_than_s is None or row.created_at < 15)
            and (not wanted.user_metadata or row.user_metadata["note"] == "a")
            and (wanted.but_newest is None or len(newer) >= wanted.but_newest)
        )
        assert (row in found) == is_meant
    assert [row.created_at for row in found] == sorted(row.created_at for row in found)


async def test_what_is_saved_without_a_time_to_live_has_its_kinds_and_what_says_its_own_keeps_that(
    tmp_path: Path,
) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        rest = client.create_rest_client()
        training = await client.create_lora_training_client_async("m", rank=4)
        await training.save_state("before")
        for holder, limits in (
            ("everyone", Limits(training_ttl_s=1000, sampler_ttl_s=500)),
            ("project:alice/default", Limits(training_ttl_s=100)),
        ):
            await administer(service.address, None, service.config.operator_key, SetLimits(holder, limits))
        await training.save_state("usual")
        await training.save_state("own", ttl_seconds=7)
        await training.save_weights_for_sampler("out")
        lasts = {c.checkpoint_id: c.expires_at and round(c.expires_at - c.time) for c in await listed(rest)}
        assert lasts == {
            "weights/before": None,
            "weights/usual": 100,
            "weights/own": 7,
            "sampler_weights/out": 500,
        }
        with pytest.raises(InvalidRequestError, match="limits"):
            wrong = SetLimits("everyone", Limits(training_ttl_s=0))
            await administer(service.address, None, service.config.operator_key, wrong)


async def listed(rest: lorry.RestClient) -> list[Checkpoint]:
    return sorted(await rest.list_checkpoints_async(), key=lambda checkpoint: checkpoint.time)


async def test_a_run_keeps_its_newest_of_each_kind_and_what_is_published(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        key = service.key
        service.may_work.set()
        order = SetLimits("tenant:alice", Limits(keep_last=2))
        await administer(service.address, None, service.config.operator_key, order)
        async with lorry.connect(service.address, api_key=key) as client:
            rest = client.create_rest_client()
            training = await client.create_lora_training_client_async("m", rank=4)
            other = await client.create_lora_training_client_async("m", rank=4)
            await other.save_state("others")
            first = await training.save_state("0")
            await training.save_weights_for_sampler("out")
            assert first.path.endswith("/weights/0")
            for name in ("1", "2", "3", "3"):  # the last takes its own name again
                await training.save_state(name, overwrite=True)
            names = {
                f"{c.tinker_path.split('/')[2] == training.model_id}:{c.checkpoint_id}" for c in await listed(rest)
            }
            assert names == {"False:weights/others", "True:sampler_weights/out", "True:weights/2", "True:weights/3"}
            await training.load_state(f"tinker://{training.model_id}/weights/3")
        gone = [event for event in service.store.audit() if event.by == "keep_last"]
        assert [event.subject.rpartition("/")[2] for event in gone] == ["0", "1"]
    async with Serving(tmp_path) as again, lorry.connect(again.address, api_key=key) as client:
        assert len(await client.create_rest_client().list_checkpoints_async()) == 4


async def test_many_go_at_once_and_what_they_are_is_told_first(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        rest = client.create_rest_client()
        training = await client.create_lora_training_client_async("m", rank=4)
        for name in "abcd":
            await training.save_state(name, user_metadata={"keep": "yes" if name == "a" else "no"})
        with pytest.raises(InvalidRequestError, match="chosen is 'everything', expected something of run, project"):
            await rest.delete_checkpoints_async()
        with pytest.raises(InvalidRequestError, match="chosen is 'everything'"):
            await rest.delete_checkpoints_async(older_than_s=0.0, but_newest=0, public=True)
        told = await rest.delete_checkpoints_async(user_metadata={"keep": "no"}, but_newest=1, only_tell=True)
        assert [each.checkpoint_id for each in told] == ["weights/b", "weights/c"]
        assert len(await listed(rest)) == 4
        gone = await rest.delete_checkpoints_async(user_metadata={"keep": "no"}, but_newest=1)
        assert gone == told
        assert [each.checkpoint_id for each in await listed(rest)] == ["weights/a", "weights/d"]
        assert len([e for e in service.store.audit() if e.event == "checkpoint_deleted"]) == 2
        assert not service.store.storage_findings()
        order = SetLimits("tenant:alice", Limits(stored_bytes=0))
        await administer(service.address, None, service.config.operator_key, order)
        with pytest.raises(LimitReachedError, match="stored_bytes"):
            await training.save_state("e")


async def test_an_end_that_no_calendar_could_tell_is_refused(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        training = await client.create_lora_training_client_async("m", rank=4)
        for wrong in (0, 10**11, 2**60):
            with pytest.raises(
                InvalidRequestError, match=f"ttl_seconds is {wrong}, expected a whole number from 1 to 3,16"
            ):
                await training.save_state("a", ttl_seconds=wrong)
        await training.save_state("a", ttl_seconds=1)


async def test_what_changes_while_many_go_is_as_the_database_says(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        rest = client.create_rest_client()
        training = await client.create_lora_training_client_async("m", rank=4)
        paths = [(await training.save_state(str(number))).path for number in range(20)]

        async def publish(path: str) -> None:
            with suppress(NotFoundError):
                await client._connection.tell(PublishCheckpoint(client._connection.next_request(), path, True))  # pyright: ignore[reportPrivateUsage]

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(rest.delete_checkpoints_async, run=training.model_id))
            for path in reversed(paths):
                tasks.start_soon(publish, path)
        there = {row["path"] for row in service.store.rows("SELECT path FROM checkpoints")}
        assert {checkpoint.tinker_path for checkpoint in await listed(rest)} == there
