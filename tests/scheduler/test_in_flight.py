"""Samplers in flight have the newest weights that their run has saved so; what was asked before has what it was asked
of."""

from functools import partial
from pathlib import Path

import anyio
import pytest

from lorry.client.connection import Connection, open_connection
from lorry.wire.actor_messages import Item
from lorry.wire.catalogue_messages import ClientSessionCreated, CreateClientSession, Slot
from lorry.wire.client_messages import CommandArguments, CreateRun, RunCreated, Submit
from lorry.wire.codec import decode
from lorry.wire.commands import CommandKind
from lorry.wire.ids import LaneId, future_id
from lorry.wire.types import LoraConfig, SaveWeightsForSamplerResponse

from .scripted import ScriptedActor
from .test_client_door import Serving


class Weights:
    """Of which folder each sample was, as the actor was told."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, str | None] = {}
        count = ScriptedActor._count  # pyright: ignore[reportPrivateUsage]

        def counted(actor: ScriptedActor, item: Item) -> None:
            self.of[item.future] = item.adapter.folder if item.adapter else None
            count(actor, item)

        patch.setattr(ScriptedActor, "_count", counted)


class Run:
    def __init__(self, connection: Connection, lane: LaneId) -> None:
        self.connection, self.lane, self.seq = connection, lane, 0

    @classmethod
    async def made(cls, connection: Connection) -> "Run":
        create = CreateClientSession(connection.next_request(), "test")
        session = (await connection.ask(create, ClientSessionCreated)).session
        slot = Slot(session, 0)
        made = CreateRun(connection.next_request(), "", "m", LoraConfig(rank=4), slot=slot)
        return cls(connection, LaneId((await connection.ask(made, RunCreated)).run))

    async def save(self, slot: int, *, in_flight: bool) -> str:
        arguments = CommandArguments(sampler_slot=slot, in_flight=in_flight)
        payload = await self.done(self.lane, self.seq, "save_weights_for_sampler", arguments)
        self.seq += 1
        sampler = decode(payload, SaveWeightsForSamplerResponse).sampling_session_id
        assert sampler is not None
        return sampler

    async def sample(self, sampler: str, seq: int) -> str:
        await self.done(LaneId(sampler), seq, "sample")
        return future_id(LaneId(sampler), seq)

    async def done(self, lane: LaneId, seq: int, kind: CommandKind, told: CommandArguments | None = None) -> bytes:
        future = self.connection.expect(future_id(lane, seq))
        number = self.connection.next_request()
        submit = Submit(number, lane, seq, kind, arguments=told or CommandArguments())
        await self.connection.submit(submit, b"", future).wait()
        return await future


async def test_those_in_flight_have_the_newest_weights_and_others_what_they_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(monkeypatch)
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        service.may_work.set()
        run = await Run.made(connection)
        first = await run.save(1, in_flight=True)
        fixed = await run.save(2, in_flight=False)
        before = [weights.of[await run.sample(sampler, 0)] for sampler in (first, fixed)]
        assert before[0] != before[1]
        second = await run.save(3, in_flight=True)
        after = [weights.of[await run.sample(sampler, 1)] for sampler in (first, fixed, second)]
        assert after[0] == after[2] != before[0]
        assert after[1] == before[1], "one that is no such has what it had"
    async with Serving(tmp_path) as again:
        rows = {row["id"]: row for row in again.store.rows("SELECT * FROM samplers")}
        assert rows[first]["folder"] == rows[second]["folder"] == after[0]
        assert [rows[each]["in_flight"] for each in (first, fixed, second)] == [1, 0, 1]


async def test_what_was_asked_before_a_save_is_over_has_the_weights_of_then_also_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(monkeypatch)
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        service.may_work.set()
        run = await Run.made(connection)
        sampler = await run.save(1, in_flight=True)
        earlier = weights.of[await run.sample(sampler, 0)]
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as connection:
        run.connection = connection
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(run.save, 2, in_flight=True))
            tasks.start_soon(run.sample, sampler, 1)
            while service.states(sampler) != ["done", "queued"]:  # noqa: ASYNC110  the journal rings no bell
                await anyio.sleep(0.01)
            service.may_work.set()
        asked_before = weights.of[future_id(LaneId(sampler), 1)]
        later = weights.of[await run.sample(sampler, 2)]
        assert asked_before == earlier != later
