"""A simulated client: it speaks the clients' protocol by itself, and resends until it has been answered."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio

from lorry.wire.client_messages import (
    VERSION,
    Answer,
    Cancel,
    CreateRun,
    CreateSampler,
    Failed,
    FromClient,
    Hello,
    Ping,
    Refuse,
    Resolved,
    RunCreated,
    SamplerCreated,
    Streamed,
    Submit,
    ToClient,
    Unknown,
    Watch,
    Welcome,
)
from lorry.wire.codec import decode, encode
from lorry.wire.errors import StreamDivergedError
from lorry.wire.ids import FutureId, future_id
from lorry.wire.sequenced import Link
from lorry.wire.streaming import Assembly, Piece

from .world import CLIENTS, World

_RESEND_S = 4.0


@dataclass(slots=True)
class Request:
    """`answered` is set when it is. Of one that is `garbled` no more can be read than its place."""

    message: FromClient
    payload: bytes = b""
    garbled: bool = False
    answered: anyio.Event = field(default_factory=anyio.Event)
    answer: bytes = b""
    code: str | None = None


class Client:
    """One connection of a tenant's. `open_futures` were acknowledged, and have not resolved here."""

    def __init__(self, world: World, tenant: str, key: str, identity: bytes) -> None:
        self.world, self.tenant, self._key, self.identity = world, tenant, key, identity
        self.waiting: dict[int, Request] = {}
        self.open_futures: dict[FutureId, None] = {}
        self._codes: dict[FutureId, str | None] = {}
        self._streams: dict[FutureId, Assembly] = {}
        self._link = Link(self._carry)
        self._changed = anyio.Event()
        self.is_silent = False

    # Talk ------------------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        self.world.network.join(self.identity, self._receive)
        self._hello()
        while True:
            await anyio.sleep(_RESEND_S)
            if self.is_silent:
                continue
            if self._is_welcome:
                self._link.beat([encode(Ping())])
                self._say_again()
            else:
                self._hello()

    def vanish(self) -> None:
        self.world.note("vanishes", client=self.identity)
        self.world.network.leave(self.identity)
        self.is_silent = True

    def ask(self, request: Request) -> Request:
        number = request.message.request  # type: ignore[union-attr]
        self.waiting[number] = request
        if self._is_welcome:
            self._send(request)
        return request

    def watch(self, future: FutureId) -> None:
        self.open_futures[future] = None
        if self._is_welcome:
            self._say(Watch([future]))

    def watch_sent(self, request: Request) -> None:
        assert isinstance(request.message, Submit | Refuse)
        self.watch(future_id(request.message.lane, request.message.seq))

    async def all_resolved(self) -> None:
        while self.waiting or self.open_futures:
            await self._changed.wait()

    async def succeeded(self, request: Request) -> bool:
        """Whether it did, as soon as this is known."""
        assert isinstance(request.message, Submit | Refuse)
        await request.answered.wait()
        future = future_id(request.message.lane, request.message.seq)
        while request.code is None and future not in self._codes:
            await self._changed.wait()
        return request.code is None and self._codes[future] is None

    @property
    def _is_welcome(self) -> bool:
        return self._link.name is not None

    def _hello(self) -> None:
        self._carry([encode(Hello(VERSION, self._key, "simulated"))])

    def _carry(self, frames: Sequence[bytes]) -> None:
        if not self.is_silent:
            self.world.network.to_broker(CLIENTS, self.identity, list(frames))

    def _say(self, message: FromClient) -> None:
        self._link.send([encode(message)])

    def _say_again(self) -> None:
        for request in self.waiting.values():
            self._send(request)
        if self.open_futures:
            self._say(Watch(list(self.open_futures)))

    def _send(self, request: Request) -> None:
        self._link.send([_header(request), request.payload])

    # Hear ------------------------------------------------------------------------------------------------------------

    def _receive(self, frames: list[bytes]) -> None:
        for message in self._link.arrived(frames):
            self._read(message)

    def _read(self, frames: list[bytes]) -> None:
        message: ToClient = decode(frames[0], ToClient)
        payload = frames[1] if len(frames) > 1 else b""
        match message:
            case Welcome():
                if not self._is_welcome:
                    self._link.open(message.session)
                    self._say_again()
            case Unknown():
                if self._link.is_tagged(message.link):
                    self._link.open(None)
                    self._hello()
            case Answer():
                self._answered(message.request, payload, None)
            case Failed():
                if message.request is not None:
                    self._answered(message.request, payload, message.error.code)
            case Resolved():
                self._resolved(message, payload)
            case Streamed():
                self._reads(message, frames[1:])
            case _:
                pass
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def _answered(self, number: int, payload: bytes, code: str | None) -> None:
        if (request := self.waiting.pop(number, None)) is None:
            return
        request.answer, request.code = payload, code
        self.world.note("answered", tenant=self.tenant, request=number, code=code)
        if code is None and isinstance(request.message, Submit | Refuse):
            self.watch_sent(request)
        request.answered.set()

    def _resolved(self, message: Resolved, payload: bytes) -> None:
        code = message.error.code if message.error else None
        self.world.note(
            "resolved",
            tenant=self.tenant,
            by=self.identity,
            future=message.future,
            code=code,
            result=payload.decode("latin-1"),
        )
        self.open_futures.pop(message.future, None)
        self._codes[message.future] = code

    def _reads(self, message: Streamed, payloads: list[bytes]) -> None:
        for future, pieces in zip(message.futures, payloads, strict=True):
            assembly = self._streams.setdefault(future, Assembly(1))
            try:
                assembly.add(decode(pieces, list[Piece]))
            except StreamDivergedError:
                self.world.note("diverges", future=future)
                del self._streams[future]
            else:
                if tokens := list(assembly.told[0].tokens):
                    self.world.note("reads", tenant=self.tenant, future=future, tokens=tokens)

    # Ask and wait ----------------------------------------------------------------------------------------------------

    async def made_run(self, create: CreateRun) -> str:
        request = self.ask(Request(create))
        await request.answered.wait()
        return decode(request.answer, RunCreated).run

    async def made_sampler(self, create: CreateSampler) -> str | None:
        request = self.ask(Request(create))
        await request.answered.wait()
        return None if request.code else decode(request.answer, SamplerCreated).sampler

    def cancel(self, number: int, future: FutureId) -> None:
        self.world.note("cancels", tenant=self.tenant, future=future)
        self.ask(Request(Cancel(number, future)))


def _header(request: Request) -> bytes:
    submit = request.message
    if not request.garbled or not isinstance(submit, Submit):
        return encode(submit)
    placed = {"type": "submit", "request": submit.request, "lane": submit.lane, "seq": submit.seq, "kind": submit.kind}
    return encode(placed | {"tokens": -1})
