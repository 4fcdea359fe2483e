"""An actor that computes nothing: it ends at once whatever it is given, and saves its runs when it is told to."""

import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import anyio

from lorry.wire import sockets
from lorry.wire.actor_messages import (
    VERSION,
    ActorHello,
    ActorLeaving,
    ActorLeft,
    ActorPing,
    ActorWelcome,
    Capacity,
    Completion,
    Item,
    LeaveNow,
    MicroBatch,
    ModelFacts,
    Outcome,
    SnapshotRecorded,
    SnapshotTaken,
    ToActor,
)
from lorry.wire.codec import MAX_PAYLOAD_BYTES, decode, encode
from lorry.wire.ids import ActorId
from lorry.wire.sequenced import Link
from lorry.wire.sockets import Channel
from lorry.wire.tasks import background_tasks
from lorry.wire.types import ForwardBackwardOutput, OptimStepResponse, SampledSequence, SampleResponse

FACTS = ModelFacts(1000, 1 << 20, "no-tokenizer", "cpu", "float32", ["attn", "mlp", "unembed"])
RESULTS: dict[str, Any] = {
    "forward_backward": ForwardBackwardOutput("scripted", [], {"loss:sum": 1.0}),
    "forward": ForwardBackwardOutput("scripted", [], {"loss:sum": 1.0}),
    "optim_step": OptimStepResponse({"grad_norm": 0.5}),
}
Sample: TypeAlias = bytes | Callable[[bytes], bytes]
SAMPLE = encode(SampleResponse([SampledSequence("length", [1], [0.0])]))


class ScriptedActor:
    """`save_every` is how many commands of a run it waits for before it says that it has saved it; `sample` is what
    comes of a sample, or makes that of its payload. It works once it `may_work`."""

    def __init__(self, channel: Channel, save_every: int, sample: Sample, may_work: anyio.Event) -> None:
        self._results = {kind: encode(result) for kind, result in RESULTS.items()}
        self._sample: Callable[[bytes], bytes] = sample if callable(sample) else lambda payload: sample
        self._channel, self._link, self._save_every = channel, Link(channel.send), save_every
        self.welcomed = anyio.Event()
        self._may_work, self._heartbeat_s = may_work, 60.0
        self._next_folder: dict[str, str] = {}
        self._since_saved: dict[str, int] = {}
        self.is_to_leave = anyio.Event()

    def hello(self, token: str, model: str, facts: ModelFacts) -> None:
        capacity = Capacity(slots=8, token_budget=1 << 20, sample_rows=64, max_rank=64)
        hello = ActorHello(VERSION, token, ActorId("scripted"), model, capacity, facts, os.getpid())
        self._channel.send([encode(hello)])

    async def run(self) -> None:
        while True:
            for frames in await self._channel.receive():
                for message in self._link.arrived(frames):
                    if isinstance(decoded := decode(message[0], ToActor, MAX_PAYLOAD_BYTES), MicroBatch):
                        await self._may_work.wait()
                    self._handle(decoded, message[1:])

    async def heartbeat(self) -> None:
        while True:
            await anyio.sleep(self._heartbeat_s / 2)
            self._link.beat([encode(ActorPing())])

    def _handle(self, message: Any, payloads: Sequence[bytes] = ()) -> None:
        match message:
            case MicroBatch(batch, _, items):
                results = [self._result(item, payload) for item, payload in zip(items, payloads, strict=True)]
                self._send(Completion(batch, [self._ended(item) for item in items], done=True), *results)
                for item in items:
                    self._count(item)
            case ActorWelcome(session, heartbeat_s):
                self._heartbeat_s = heartbeat_s
                self._link.open(session)
                self.welcomed.set()
            case LeaveNow():
                self.is_to_leave.set()
            case SnapshotRecorded(run, next_folder):
                self._next_folder[run] = next_folder
            case _:
                pass

    def _result(self, item: Item, payload: bytes) -> bytes:
        return self._sample(payload) if item.kind == "sample" else self._results.get(item.kind, b"")

    def _ended(self, item: Item) -> Outcome:
        if item.kind in ("save_state", "save_weights_for_sampler") and item.folder is not None:
            Path(item.folder).mkdir(parents=True)
        if item.kind in ("forward_backward", "optim_step"):
            return Outcome(item.future, metrics=RESULTS[item.kind].metrics, data=1)
        return Outcome(item.future)

    def _count(self, item: Item) -> None:
        if item.seq < 0 or item.adapter is None:
            return
        run, folder = item.adapter.key, self._next_folder.get(item.adapter.key, item.adapter.snapshot)
        self._since_saved[run] = self._since_saved.get(run, 0) + 1
        if self._since_saved[run] >= self._save_every and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._send(SnapshotTaken(run, folder, item.seq, 0.0))
            self._since_saved[run] = 0

    def leave(self) -> None:
        """In good order: it holds nothing, and what it was to save is saved."""
        self._send(ActorLeaving())
        self._send(ActorLeft())

    def _send(self, message: object, *payloads: bytes) -> None:
        self._link.send([encode(message), *payloads])


@asynccontextmanager
async def scripted_actor(
    address: str,
    token: str,
    model: str,
    save_every: int = 1000,
    sample: Sample = SAMPLE,
    may_work: anyio.Event | None = None,
    facts: ModelFacts = FACTS,
) -> AsyncGenerator[ScriptedActor]:
    """Serves `model` at the broker's address for actors, for as long as the block lasts."""
    if may_work is None:
        (may_work := anyio.Event()).set()
    with sockets.connect(address, None, b"actor-" + secrets.token_bytes(8)) as channel:
        actor = ScriptedActor(channel, save_every, sample, may_work)
        actor.hello(token, model, facts)
        async with background_tasks() as tasks:
            tasks.start_soon(actor.run)
            await actor.welcomed.wait()
            tasks.start_soon(actor.heartbeat)
            yield actor
