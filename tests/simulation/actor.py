"""A simulated actor: it speaks the actors' protocol, holds runs' states, executes in order, saves, dies and returns."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from lorry.actors.outbox import End, Outbox, Written
from lorry.wire.actor_messages import (
    VERSION,
    ActorHello,
    ActorLeaving,
    ActorLeft,
    ActorPing,
    ActorWelcome,
    CancelCommand,
    Capacity,
    Completion,
    Expelled,
    FromActor,
    Item,
    Made,
    MicroBatch,
    ModelFacts,
    Outcome,
    Retired,
    Share,
    SnapshotFailed,
    SnapshotRecorded,
    SnapshotTaken,
    ToActor,
)
from lorry.wire.codec import decode, encode
from lorry.wire.errors import CheckpointError, CommandCancelledError, ErrorInfo, InvalidRequestError, NonFiniteError
from lorry.wire.ids import ActorId, BatchId, FutureId
from lorry.wire.sequenced import Link
from lorry.wire.streaming import Piece, Resumed, made_before

from .numbers import Payload, measured, mixed
from .states import State, UnreadableError
from .world import ACTORS, MODEL, TOKEN, World

_FACTS = ModelFacts(1000, 1000, "simulated", "cpu", "float32", ["attn", "mlp", "unembed"])

_GIVES = {"forward": "forward", "forward_backward": "gradient"}


class Actor:
    """One process, from its start to its end, whichever that is."""

    def __init__(self, world: World, name: str, identity: bytes, capacity: Capacity) -> None:
        self._world, self._name, self._identity, self._capacity = world, name, identity, capacity
        self._runs: dict[str, State] = {}
        self._next_folder: dict[str, str] = {}
        self._writing: set[str] = set()
        self._outbox = Outbox()
        self._copied: Counter[str] = Counter()
        self._batch = BatchId(0)
        self._done: list[tuple[Outcome, bytes]] = []
        self._batches: deque[tuple[MicroBatch, list[bytes]]] = deque()
        self._cancelled: set[FutureId] = set()
        self._wake = anyio.Event()
        self._link = Link(self._carry)
        self._is_retired = False
        self._scope = anyio.CancelScope()
        self.is_silent = False

    # A life ----------------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        world = self._world
        world.network.join(self._identity, self._receive)
        world.note("actor up", actor=self._name)
        self._hello()
        with self._scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._ping)
                await self._work(tasks)
        world.network.leave(self._identity)

    def __str__(self) -> str:
        return self._name

    def die(self, why: str) -> None:
        self._world.note("actor dies", actor=self._name, why=why, held=sorted(self._held()))
        self._world.network.leave(self._identity)
        self._scope.cancel()

    def leave(self) -> None:
        if self._link.name is not None:
            self._say(ActorLeaving())

    def _held(self) -> set[str]:
        return {item.future for batch, _ in self._batches for item in batch.items}

    async def _ping(self) -> None:
        while True:
            await anyio.sleep(self._world.heartbeat_s)
            if self.is_silent:
                continue
            if self._link.name is None:
                self._hello()
            else:
                self._link.beat([encode(ActorPing())])

    def _hello(self) -> None:
        hello = ActorHello(VERSION, TOKEN, ActorId(self._name), MODEL, self._capacity, _FACTS, 1)
        self._carry([encode(hello)])

    def _carry(self, frames: Sequence[bytes]) -> None:
        self._world.network.to_broker(ACTORS, self._identity, list(frames))

    def _say(self, message: FromActor, payloads: list[bytes] | None = None) -> None:
        self._link.send([encode(message), *(payloads or [])])

    def _receive(self, frames: list[bytes]) -> None:
        for message in self._link.arrived(frames):
            self._read(message)

    def _read(self, frames: list[bytes]) -> None:
        message: ToActor = decode(frames[0], ToActor)
        match message:
            case MicroBatch():
                self._link.confirm()
                self._batches.append((message, frames[1:]))
                self._world.note("handed", actor=self._name, futures=[item.future for item in message.items])
            case CancelCommand():
                self._cancelled.add(message.future)
            case SnapshotRecorded():
                self._next_folder[message.run] = message.next_folder
                self._writing.discard(message.run)
            case Retired():
                self._is_retired = True
            case Expelled():
                self.die(f"expelled: {message.reason}")
            case ActorWelcome(session):
                if self._link.name is None:
                    self._link.open(session)
            case _:
                pass
        self._wake.set()

    # Work ------------------------------------------------------------------------------------------------------------

    async def _work(self, tasks: TaskGroup) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._batches:
                await self._execute(*self._batches[0], tasks)
                self._batches.popleft()
                for run in list(self._runs):
                    if self._world.chance.random() < self._world.flavour.snapshots:
                        tasks.start_soon(self._snapshot, run)
            if self._is_retired and not self._copied:
                for run in list(self._runs):
                    await self._snapshot(run)
                self._world.note("actor left", actor=self._name)
                self._say(ActorLeft())
                tasks.cancel_scope.cancel()

    async def _execute(self, batch: MicroBatch, payloads: list[bytes], tasks: TaskGroup) -> None:
        """All in order; what is done is told now and then, and the rest at the end. Weights to sample from are written
        meanwhile, and what their run does is told after them."""
        self._batch = batch.batch
        for item, payload in zip(batch.items, payloads, strict=True):
            await self._world.pause(0.3)
            if item.stream and item.future not in self._cancelled:
                payload = await self._streamed(item, payload)
            if payload.endswith(b"|poison"):
                self.die(f"poisoned by {item.future}")
                await anyio.sleep_forever()
            end = self._ended(item, payload)
            if item.kind == "save_weights_for_sampler" and end[0].error is None:
                self._outbox.wait_for(_run_of(item), batch.batch, item.future)
                tasks.start_soon(self._write_copy, item, self._runs[_run_of(item)])
            elif (
                item.kind == "sample" or _is_part(item) or not self._outbox.keeps(_run_of(item), End(batch.batch, *end))
            ):
                self._done.append(end)
            if self._world.chance.random() < 0.3:
                self._tell_what_is_done(is_last=False)
        self._tell_what_is_done(is_last=True)

    async def _streamed(self, item: Item, content: bytes) -> bytes:
        """Tokens come a few at a time, and are other ones each time that they are drawn."""
        chance, tokens = self._world.chance, list[int]()
        if item.resumed:
            resumed = decode(content, Resumed)
            content, tokens = resumed.request, list(made_before(resumed.made, 1).told[0].tokens)
        while chance.random() < 0.8:
            await self._world.pause(1.0)
            new = [chance.randrange(1000) for _ in range(chance.choice((1, 1, 3)))]
            self._say(Made([item.future]), [encode([Piece(0, len(tokens), new, [0.0] * len(new))])])
            tokens += new
            self._world.note("streams", actor=self._name, future=item.future, tokens=list(tokens))
        self._world.note("streamed", actor=self._name, future=item.future, tokens=tokens)
        return content

    async def _write_copy(self, item: Item, state: State) -> None:
        run = _run_of(item)
        self._copied[run] += 1
        await self._world.pause(4.0)
        assert item.folder is not None
        state.written(Path(item.folder))
        self._copied -= Counter([run])
        if self._done:
            self._tell_what_is_done(is_last=False)
        for told in self._outbox.ended(run, Outcome(item.future, size_bytes=1)):
            if isinstance(told, End):
                self._say(Completion(told.batch, [told.outcome], False), [told.payload])
            else:
                self._say(told)
        self._wake.set()

    def _tell_what_is_done(self, *, is_last: bool) -> None:
        done, self._done = self._done, []
        self._say(Completion(self._batch, [outcome for outcome, _ in done], is_last), [result for _, result in done])

    def _ended(self, item: Item, content: bytes) -> tuple[Outcome, bytes]:
        payload = Payload.unpacked(content) if content else None
        if item.kind == "sample":
            return self._sampled(item, payload)
        assert item.adapter is not None
        key = _run_of(item)
        if item.share is not None and item.share.stage == "part":
            return self._part(item, item.share, payload)
        try:
            state = self._runs[key] if key in self._runs else self._restored(item)
        except UnreadableError as error:
            return _failed(item, CheckpointError(str(error)).info, unrestored=True)
        if item.adapter.snapshot is not None:
            self._next_folder.setdefault(key, item.adapter.snapshot)
        if item.share is not None and item.share.stage == "publish":
            self._runs[key] = state
            State(state.weights).written(Path(item.share.folders[0]))
            return Outcome(item.future), b""
        self._world.note("executed", actor=self._name, run=key, seq=item.seq, kind=item.kind, before=state.seq)
        state, outcome, result = self._applied(state, item, payload)
        self._runs[key] = replace(state, seq=item.seq)
        return outcome, result

    def _part(self, item: Item, share: Share, payload: Payload | None) -> tuple[Outcome, bytes]:
        """The whole result and gradient, in the name of a part: home sees whether all parts are of one command."""
        assert payload is not None and item.adapter is not None and item.adapter.folder is not None
        if payload.flaw == "bad":
            return _failed(item, InvalidRequestError("bad payload").info)
        try:
            weights = State.read(Path(item.adapter.folder)).weights
        except UnreadableError as error:
            return _failed(item, CheckpointError(str(error)).info)
        self._world.note("computed", actor=self._name, future=item.future, part=share.index, of=share.parts)
        gradient = mixed(_GIVES[item.kind], weights, payload.uid)
        State(f"{share.index}/{share.parts}", (gradient,), payload.tokens).written(Path(share.folders[0]))
        return Outcome(item.future), b""

    def _gathered(self, state: State, item: Item, share: Share) -> tuple[State, Outcome, bytes]:
        try:
            parts = [State.read(Path(folder)) for folder in share.folders]
        except UnreadableError as error:
            return state, *_failed(item, CheckpointError(str(error)).info)
        are_all = [part.weights for part in parts] == [f"{i}/{len(parts)}" for i in range(len(parts))]
        gradients, tokens = {part.pending[0] for part in parts}, parts[0].seq
        result = gradients.pop() if are_all and len(gradients) == 1 else "torn"
        if item.kind == "forward":
            return state, Outcome(item.future, prefill_tokens=tokens), result.encode()
        state = replace(state, pending=(*state.pending, result))
        return state, _backward(item, tokens, result), result.encode()

    def _restored(self, item: Item) -> State:
        assert item.adapter is not None and item.adapter.lora.seed is not None
        folder = item.adapter.folder
        state = State.fresh(item.adapter.lora.seed) if folder is None else State.read(Path(folder))
        self._world.note("restored", actor=self._name, run=item.adapter.key, seq=state.seq)
        return state

    def _applied(self, state: State, item: Item, payload: Payload | None) -> tuple[State, Outcome, bytes]:
        if item.share is not None:
            return self._gathered(state, item, item.share)
        if item.kind == "save_weights_for_sampler":
            return state, Outcome(item.future), b""
        if item.kind == "save_state":
            assert item.folder is not None
            replace(state, seq=item.seq).written(Path(item.folder))
            return state, Outcome(item.future, size_bytes=1), b""
        if item.kind == "load_state":
            return self._loaded(state, item)
        if item.discard:
            return replace(state, pending=()), Outcome(item.future, discarded=True), b""
        if payload is None:
            return state, *_failed(item, InvalidRequestError("no payload").info)
        if payload.flaw == "bad":
            return state, *_failed(item, InvalidRequestError("bad payload").info)
        if item.kind == "optim_step":
            if payload.flaw == "nan":
                return replace(state, pending=()), *_failed(item, NonFiniteError("nan").info, discarded=True)
            state, result = state.stepped(payload)
            return state, Outcome(item.future, metrics={"step": measured(result)}), result.encode()
        if item.kind == "forward":
            result = mixed("forward", state.weights, payload.uid)
            return state, Outcome(item.future, prefill_tokens=payload.tokens), result.encode()
        state, result = state.backward(payload)
        return state, _backward(item, payload.tokens, result), result.encode()

    def _loaded(self, state: State, item: Item) -> tuple[State, Outcome, bytes]:
        assert item.folder is not None
        try:
            found = State.read(Path(item.folder))
        except UnreadableError as error:
            return state, *_failed(item, CheckpointError(str(error)).info)
        return State(found.weights, (), state.seq), Outcome(item.future), b""

    def _sampled(self, item: Item, payload: Payload | None) -> tuple[Outcome, bytes]:
        assert payload is not None, "samples are never replayed"
        if item.future in self._cancelled:
            return _failed(item, CommandCancelledError("cancelled").info)
        try:
            weights = "base" if item.adapter is None else State.read(Path(item.adapter.folder or "")).weights
        except UnreadableError as error:
            return _failed(item, CheckpointError(str(error)).info)
        self._world.note("sampled", actor=self._name, future=item.future)
        result = mixed("sample", weights, payload.uid)
        return Outcome(item.future, prefill_tokens=3, cached_prefill_tokens=1, sample_tokens=payload.tokens), (
            result.encode()
        )

    # Snapshots -------------------------------------------------------------------------------------------------------

    async def _snapshot(self, run: str) -> None:
        """As it is now; written later, and told later still."""
        state, folder = self._runs[run], self._next_folder.get(run)
        if folder is None or run in self._writing:
            return
        self._writing.add(run)
        await self._world.pause(1.0)
        if self._world.chance.random() < 0.1:
            self._writing.discard(run)
            self._tell(SnapshotFailed(run, folder, "the disk is full"))
            return
        state.written(Path(folder))
        await self._world.pause(0.2)
        self._world.note("snapshot", actor=self._name, run=run, seq=state.seq, folder=folder[-6:])
        self._tell(SnapshotTaken(run, folder, state.seq, 0.0))

    def _tell(self, message: Written) -> None:
        """After the commands that it covers."""
        if not self._outbox.keeps(message.run, message):
            self._say(message)


def _is_part(item: Item) -> bool:
    return item.share is not None and item.share.stage == "part"


def _run_of(item: Item) -> str:
    assert item.adapter is not None
    return item.adapter.key


def _backward(item: Item, tokens: int, result: str) -> Outcome:
    return Outcome(item.future, train_tokens=tokens, metrics={"gradient:sum": measured(result)}, data=1)


def _failed(
    item: Item, error: ErrorInfo, *, discarded: bool = False, unrestored: bool = False
) -> tuple[Outcome, bytes]:
    return Outcome(item.future, error, discarded=discarded, unrestored=unrestored), b""
