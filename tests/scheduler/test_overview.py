"""What goes on: to a tenant its own, to administrators and operators all; bounded, and true."""

from contextlib import closing
from pathlib import Path

import pytest

import lorry
from lorry.client.connection import Connection, open_connection
from lorry.client.operator import administer
from lorry.scheduler.overview import is_wanted
from lorry.storage.reports import waiting
from lorry.storage.rows import CommandRow
from lorry.storage.store import Store
from lorry.wire.admin_messages import (
    Administer,
    AdminOrder,
    Chosen,
    LimitCheckpoints,
    ListJobs,
    LookOver,
    RemoveCheckpoints,
    ShareCheckpoints,
)
from lorry.wire.catalogue_messages import OwnJobs
from lorry.wire.client_messages import CommandArguments, CreateSampler, SamplerCreated, Submit
from lorry.wire.codec import decode
from lorry.wire.errors import InvalidRequestError, LorryError, NotFoundError, PermissionDeniedError
from lorry.wire.ids import FutureId, LaneId, TenantId, future_id
from lorry.wire.overview import Jobs, JobsWanted, Overview

from .test_client_door import DATUM, Serving

ALICE, BOB = TenantId("alice"), TenantId("bob")


async def sample(connection: Connection, nonce: str) -> FutureId:
    create = CreateSampler(connection.next_request(), nonce, base_model="m")
    lane = LaneId((await connection.ask(create, SamplerCreated)).sampler)
    future = connection.expect(future_id(lane, 0))
    await connection.submit(Submit(connection.next_request(), lane, 0, "sample", tokens=7, rows=1), b"", future).wait()
    return future.id


async def test_a_tenant_sees_what_waits_of_its_own_and_an_administrator_of_all(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        bobs = service.store.create_key(BOB, 1.0)
        admins = service.store.create_key(TenantId("boss"), 1.0, scopes=["admin"])
        async with (
            lorry.connect(service.address, api_key=service.key) as alice,
            lorry.connect(service.address, api_key=bobs) as other,
            open_connection(service.address, bobs) as bob,
            open_connection(service.address, admins) as boss,
        ):
            training = await alice.create_lora_training_client_async("m", rank=4)
            for _ in range(3):
                await training.forward_backward_async([DATUM], "cross_entropy")
            sampled = await sample(bob, "bobs")

            hers = await alice.create_rest_client().list_jobs_async()
            assert [job.future for job in hers.jobs] == [f"{training.model_id}:{seq}" for seq in range(3)]
            assert {job.tenant for job in hers.jobs} == {"alice"}
            assert hers.total == 3
            assert hers.jobs[0].reason == "it is being executed"
            assert all(0 < job.accepted_at <= hers.at for job in hers.jobs)
            (his,) = (await other.create_rest_client().list_jobs_async(kind="sample")).jobs
            assert (his.future, his.run, his.tokens) == (sampled, None, 7)
            with pytest.raises(NotFoundError, match="there is no run or sampler"):
                await other.create_rest_client().list_jobs_async(run=training.model_id)

            async def of(wanted: JobsWanted) -> Jobs:
                return await boss.ask(Administer(boss.next_request(), ListJobs(wanted)), Jobs)

            assert (await of(JobsWanted())).total == 4
            newest = await of(JobsWanted(limit=1, newest=True))
            assert (newest.total, [job.future for job in newest.jobs]) == (4, [sampled])
            oldest = await of(JobsWanted(ALICE, limit=2))
            assert (oldest.total, [job.future for job in oldest.jobs]) == (3, [job.future for job in hers.jobs[:2]])
            overview = await boss.ask(Administer(boss.next_request(), LookOver()), Overview)
            assert {queue.tenant: queue.commands for queue in overview.queues} == {"alice": 3, "bob": 1}
            assert overview.commands == 4
            assert [(actor.actor, actor.runs) for actor in overview.actors] == [("scripted", 1)]
            assert overview.oldest[0].future == hers.jobs[0].future

            service.may_work.set()
            while (await of(JobsWanted())).total:
                pass
            after = await boss.ask(Administer(boss.next_request(), LookOver()), Overview)
            assert (after.queues, after.commands, after.queued_tokens, after.oldest) == ([], 0, 0, [])


async def test_who_may_not_read_is_told_nothing(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        trains = service.store.create_key(ALICE, 1.0, scopes=["train"])
        async with (
            open_connection(service.address, trains) as trainer,
            open_connection(service.address, service.key) as reader,
        ):
            with pytest.raises(PermissionDeniedError, match="expected read for 'own_jobs'"):
                await trainer.tell(OwnJobs(trainer.next_request()))
            for order in (ListJobs(), LookOver()):
                with pytest.raises(PermissionDeniedError, match="expected admin"):
                    await reader.tell(Administer(reader.next_request(), order))
            for wrong in (OwnJobs(reader.next_request(), limit=0), OwnJobs(reader.next_request(), limit=201)):
                with pytest.raises(LorryError, match="limit"):
                    await reader.tell(wrong)
        with pytest.raises(InvalidRequestError, match="operator_key"):
            await administer(service.address, None, "another", ListJobs())


async def test_what_waits_is_as_old_as_the_journal_says_whether_a_broker_serves_or_not(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as alice:
        training = await alice.create_lora_training_client_async("m", rank=4)
        await training.forward_backward_async([DATUM], "cross_entropy")
        (before,) = (await alice.create_rest_client().list_jobs_async()).jobs
    with closing(Store(tmp_path)) as store:
        ((job,), total) = waiting(store, JobsWanted(ALICE, run=training.model_id, base_model="m"))
        assert (job.future, job.run, total) == (before.future, training.model_id, 1)
        assert job.reason == "no broker serves this data: it goes on when one does"
        assert waiting(store, JobsWanted(BOB)) == ([], 0)
    async with Serving(tmp_path) as service:
        key = service.config.operator_key
        answer = decode(await administer(service.address, None, key, ListJobs()), Jobs)
        (after,) = answer.jobs
        assert after.accepted_at == job.accepted_at


@pytest.mark.parametrize(
    ("wanted", "is_it"),
    [
        (JobsWanted(), True),
        (JobsWanted(run="sampler-1"), True),
        (JobsWanted(run="run-1"), True),
        (JobsWanted(run="run-2"), False),
        (JobsWanted(ALICE, "run-1", "m", "sample"), True),
        (JobsWanted(BOB, "run-1"), False),
        (JobsWanted(base_model="n"), False),
        (JobsWanted(kind="forward"), False),
    ],
)
def test_a_command_is_wanted_where_all_that_is_said_is_so(wanted: JobsWanted, is_it: bool) -> None:
    future, lane = FutureId("sampler-1:0"), LaneId("sampler-1")
    row = CommandRow(future, lane, 0, "sample", ALICE, "m", 1, 1, CommandArguments())
    assert is_wanted(row, "run-1", wanted) == is_it


async def test_an_operator_changes_the_checkpoint_that_was_seen_and_no_other(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        admins = service.store.create_key(TenantId("boss"), 1.0, scopes=["admin"])
        async with (
            lorry.connect(service.address, api_key=service.key) as alice,
            open_connection(service.address, admins) as boss,
            open_connection(service.address, service.key) as hers,
        ):
            training = await alice.create_lora_training_client_async("m", rank=4)
            await training.save_state("kept")
            (row,) = service.store.checkpoints()
            now, older = Chosen(row.path, row.created_at), Chosen(row.path, row.created_at - 1)
            nobodys = Chosen("tinker://x/weights/y", 1.0)
            with pytest.raises(PermissionDeniedError, match="expected admin"):
                await hers.tell(Administer(hers.next_request(), RemoveCheckpoints([now])))

            async def ask(order: AdminOrder) -> list[str]:
                return await boss.ask(Administer(boss.next_request(), order), list[str])

            assert await ask(RemoveCheckpoints([older, nobodys])) == [row.path, nobodys.path]
            with pytest.raises(LorryError, match="ttl_seconds"):
                await ask(LimitCheckpoints([now], 0))
            assert service.store.checkpoints() == [row]
            assert await ask(ShareCheckpoints([now], True)) == []
            assert await ask(LimitCheckpoints([now, nobodys], 3600)) == [nobodys.path]
            (changed,) = service.store.checkpoints()
            assert changed.public
            assert changed.expires_at is not None
            assert await ask(RemoveCheckpoints([now])) == []
            assert service.store.checkpoints() == []
            assert await ask(RemoveCheckpoints([now])) == [row.path]
            events = service.store.audit(ALICE, kind="checkpoint")
            boss_key = service.store.api_keys(TenantId("boss"))[0].id
            assert [(event.event, event.by) for event in events[1:]] == [
                ("checkpoint_published", boss_key),
                ("checkpoint_expiry_set", boss_key),
                ("checkpoint_deleted", boss_key),
            ]
