"""What clients make of their connections: who has read what, and what is cancelled before it was taken."""

from contextlib import AsyncExitStack, closing
from pathlib import Path

import anyio
import pytest

import lorry
from lorry.client.connection import Connection, open_connection
from lorry.scheduler import broker
from lorry.scheduler.config import BrokerConfig
from lorry.storage.store import Store
from lorry.wire.catalogue_messages import ExpireCheckpoint
from lorry.wire.client_messages import CommandArguments, CreateRun, CreateSampler, RunCreated, SamplerCreated, Submit
from lorry.wire.codec import decode
from lorry.wire.errors import CommandCancelledError, NotFoundError
from lorry.wire.ids import FutureId, LaneId, TenantId, future_id
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, LoraConfig, SaveWeightsForSamplerResponse, TensorData

from .scripted import scripted_actor

DATUM = Datum(
    ModelInput.from_ints([1]),
    {"target_tokens": TensorData([2], "int64", [1]), "weights": TensorData([1.0], "float32", [1])},
)


class Serving(AsyncExitStack):
    """A broker of the model m, an actor that computes nothing, and a key."""

    def __init__(
        self, data: Path, *, heartbeat_s: float = 60.0, max_waiting: int = 1000, sessions_per_tenant: int = 500
    ) -> None:
        super().__init__()
        self.config = BrokerConfig(
            data,
            ("m",),
            "token",
            bind="tcp://127.0.0.1:*",
            heartbeat_s=heartbeat_s,
            max_waiting=max_waiting,
            sessions_per_tenant=sessions_per_tenant,
        )
        self.may_work = anyio.Event()

    async def __aenter__(self) -> "Serving":
        await super().__aenter__()
        addresses = await self.enter_async_context(broker.running(self.config))
        self.store = self.enter_context(closing(Store(self.config.data)))
        self.address, self.key = addresses.clients, self.store.create_key(TenantId("alice"), 1.0)
        await self.enter_async_context(scripted_actor(addresses.actors, "token", "m", may_work=self.may_work))
        return self

    def states(self, run: str) -> list[str]:
        rows = self.store.rows("SELECT state FROM commands WHERE lane = ? ORDER BY seq", run)
        return [row["state"] for row in rows]

    def is_read(self, future: FutureId) -> bool:
        rows = self.store.rows("SELECT told_at FROM results WHERE future = ?", future)
        return any(row["told_at"] is not None for row in rows)


async def sample_over(connection: Connection, nonce: str) -> FutureId:
    create = CreateSampler(connection.next_request(), nonce, base_model="m")
    lane = LaneId((await connection.ask(create, SamplerCreated)).sampler)
    future = connection.expect(future_id(lane, 0))
    connection.submit(Submit(connection.next_request(), lane, 0, "sample"), b"", future)
    await future
    return future.id


async def test_a_result_that_is_relayed_is_read_when_whoever_asked_has_it(tmp_path: Path) -> None:
    async with Serving(tmp_path, heartbeat_s=0.5) as service:
        service.may_work.set()
        async with (
            open_connection(service.address, service.key, relays=True) as relay,
            open_connection(service.address, service.key) as direct,
        ):
            relayed, own = await sample_over(relay, "relayed"), await sample_over(direct, "own")
            while not service.is_read(own):  # noqa: ASYNC110  the journal rings no bell
                await anyio.sleep(0.01)
            assert not service.is_read(relayed)
            relay.was_read(relayed)
            while not service.is_read(relayed):  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_nobody_says_of_another_tenants_results_that_they_were_read(tmp_path: Path) -> None:
    async with Serving(tmp_path, heartbeat_s=0.5) as service:
        service.may_work.set()
        other = service.store.create_key(TenantId("mallory"), 1.0)
        async with (
            open_connection(service.address, service.key, relays=True) as relay,
            open_connection(service.address, other, relays=True) as stranger,
        ):
            relayed, own = await sample_over(relay, "relayed"), await sample_over(stranger, "own")
            stranger.was_read(relayed)
            stranger.was_read(own)
            while not service.is_read(own):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            assert not service.is_read(relayed)


async def test_what_is_cancelled_while_the_client_holds_it_is_never_executed_and_leaves_no_gap(tmp_path: Path) -> None:
    async with (
        Serving(tmp_path, heartbeat_s=0.5, max_waiting=2) as service,
        lorry.connect(service.address, api_key=service.key) as client,
    ):
        training = await client.create_lora_training_client_async("m", rank=4)
        futures = [training.forward_backward([DATUM], "cross_entropy") for _ in range(6)]
        await futures[4].cancel()  # it has not been refused yet
        with pytest.raises(CommandCancelledError):
            await futures[4]
        await futures[5].cancel()  # it has been
        with pytest.raises(CommandCancelledError):
            await futures[5]
        service.may_work.set()
        for future in futures[:4]:
            await future
        await training.forward_backward([DATUM], "cross_entropy")
        assert service.states(training.model_id) == ["done"] * 4 + ["failed"] * 2 + ["done"]


async def save_unnamed(connection: Connection, run: LaneId, seq: int, ttl_seconds: int | None = None) -> str:
    future = connection.expect(future_id(run, seq))
    arguments = CommandArguments(unnamed=True, ttl_seconds=ttl_seconds)
    kind = "save_weights_for_sampler"
    connection.submit(Submit(connection.next_request(), run, seq, kind, arguments=arguments), b"", future)
    return decode(await future, SaveWeightsForSamplerResponse).path


async def test_weights_without_a_name_live_as_long_as_their_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorry.scheduler.finishing.ASKED_WITHIN_S", 0.0)
    async with Serving(tmp_path) as service, open_connection(service.address, service.key) as alice:
        service.may_work.set()
        create = CreateRun(alice.next_request(), "nonce", "m", LoraConfig(rank=4))
        run = LaneId((await alice.ask(create, RunCreated)).run)
        chosen = await save_unnamed(alice, run, 0, ttl_seconds=3600)
        later, gone = [await save_unnamed(alice, run, seq) for seq in (1, 2)]
        await alice.tell(ExpireCheckpoint(alice.next_request(), later, 3600))
        for seq in range(3, 9):
            await save_unnamed(alice, run, seq)
        with pytest.raises(NotFoundError):
            await alice.tell(ExpireCheckpoint(alice.next_request(), gone, 3600))
        for path in (chosen, later):
            await alice.ask(CreateSampler(alice.next_request(), path, model_path=path), SamplerCreated)
