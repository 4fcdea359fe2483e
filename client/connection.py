"""One socket to the broker. What a network loses on the way is the link's business, in both directions.

A broker that restarts costs a pause: it answers `Unknown`, the connection says hello again, sends again what was not
answered, and asks again for what has not resolved.
"""

import logging
import math
import platform
import secrets
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import anyio

from ..wire import sockets
from ..wire.client_messages import (
    VERSION,
    Answer,
    Cancel,
    Failed,
    Goodbye,
    Hello,
    NewsCame,
    Ping,
    Pong,
    Read,
    Refuse,
    Resolved,
    Streamed,
    Submit,
    ToClient,
    Unknown,
    Watch,
    Welcome,
)
from ..wire.codec import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, decode, encode
from ..wire.errors import (
    CommandCancelledError,
    ConnectionLostError,
    LorryError,
    MessageTooLargeError,
    StorageUnavailableError,
    TooManyWaitingError,
    revive,
)
from ..wire.ids import FutureId, LaneId, future_id
from ..wire.news import Followed
from ..wire.sequenced import Link
from ..wire.sockets import Channel
from ..wire.tasks import background_tasks
from .following import Feed, Followings
from .futures import Future
from .requests import Acknowledgement, Request
from .spans import traced
from .streams import SampleStream

T = TypeVar("T")

log = logging.getLogger("lorry")

_NAMES_AT_ONCE = 500
"""Of futures, in one message."""
_COME_AGAIN = (TooManyWaitingError, StorageUnavailableError)


class Connection:
    """Use `open_connection`. Requests may be made from any task of the event loop.

    A command that finds too many before it, and whatever finds a server whose disk is full, waits here, and goes out
    again when something is over, or with a heartbeat; what comes too fast, when the server said. A connection that
    `relays` what others ask for tells them instead; and `was_read` is to be called of results that they have got.
    """

    def __init__(self, channel: Channel, address: str, api_key: str, timeout_s: float, *, relays: bool = False) -> None:
        self._relays = relays
        self._channel, self._address, self._api_key, self._timeout_s = channel, address, api_key, timeout_s
        self._link = Link(channel.send)
        self._requests: dict[int, Request] = {}
        self._futures: dict[FutureId, Future[Any]] = {}
        self._held: dict[LaneId | None, list[int]] = {}
        self._due: dict[int, float] = {}
        self._has_due = anyio.Event()
        self._cancelled: set[FutureId] = set()
        self._were_read: list[FutureId] = []
        self._found_disk_full = False
        self._numbers = 0
        self._welcome: Welcome | None = None
        self._welcomed = anyio.Event()
        self._refused: LorryError | None = None
        self._put_off: LorryError | None = None
        self._heard = anyio.current_time()
        self._closed = False
        self._followings = Followings(self.next_request, lambda message, fail: self._start(message, b"", fail))

    @property
    def is_over(self) -> bool:
        """Closed, or not let in (any longer): whoever wants to go on needs another."""
        return self._closed or self._refused is not None

    # Requests --------------------------------------------------------------------------------------------------------

    def next_request(self) -> int:
        self._numbers += 1
        return self._numbers

    async def ask(self, message: Any, kind: type[T], payload: bytes = b"") -> T:
        """Send a request and wait for its answer. Raises the server's LorryError."""
        request = self._start(message, payload)
        return decode(await self._answer(request), kind)

    async def tell(self, message: Any, payload: bytes = b"") -> None:
        """Send a request whose answer is only that it is done. Raises the server's LorryError."""
        await self._answer(self._start(message, payload))

    def say(self, message: Any, payload: bytes, on_error: Callable[[LorryError], None]) -> Acknowledgement:
        """Send a request at once, whose answer is only that it is done; whether anybody waits for that or not,
        `on_error` gets the server's refusal."""
        return Acknowledgement(self._start(message, payload, on_error))

    def follow(self, of: Followed) -> AbstractAsyncContextManager[Feed]:
        """News of what the tenant has, or of the deployment, as they come, for as long as the block lasts: the first at
        once. Raises PermissionDeniedError."""
        return self._followings.follow(of)

    def submit(self, message: Submit, payload: bytes, future: Future[Any]) -> Acknowledgement:
        """Send a command at once; its result will resolve `future`, and so will a refusal.

        Raises MessageTooLargeError where the payload exceeds what the server takes.
        """
        limit = self._welcome.max_payload_bytes if self._welcome else MAX_PAYLOAD_BYTES
        if len(payload) > limit:
            raise MessageTooLargeError(f"the request has {len(payload):,} bytes, the limit is {limit:,}")

        message = message if self._relays else traced(message, future)
        watched_before = future.id in self._futures

        def refused(error: LorryError) -> None:
            if not watched_before:  # else it is another request's, which this one was not
                self._futures.pop(future.id, None)
                future.reject(error)

        request = self._start(message, payload, refused)
        request.command = message
        self._futures[future.id] = future
        return Acknowledgement(request)

    def expect(self, future: FutureId) -> Future[bytes]:
        """The future of this id, which resolves to the encoded result; the same one for all who ask while it is open.

        Nothing is sent: `submit` it, or `watch` it.
        """
        return self._futures.get(future) or Future(future, bytes, self.cancel)

    def watch(self, future: FutureId) -> Future[bytes]:
        """The future of a command that was submitted before, by whomever."""
        known = self._futures.get(future)
        if known is None:
            known = self._futures[future] = self.expect(future)
            if self._welcome:
                self._link.send([encode(Watch([future]))])
        return known

    async def cancel(self, future: FutureId) -> None:
        """One that is held here ends here, and its place in its run's order with it."""
        if future in self._futures:
            self._cancelled.add(future)
        held = [*(number for numbers in self._held.values() for number in numbers), *self._due]
        if not any(self._give_up(number) for number in held):
            await self.tell(Cancel(self.next_request(), future))

    def _give_up(self, number: int) -> bool:
        """If the command was cancelled that was refused, and is to be sent again: what is sent says so."""
        request = self._requests.get(number)
        if request is None or (command := request.command) is None:
            return False
        if (future := future_id(command.lane, command.seq)) not in self._cancelled:
            return False
        error = CommandCancelledError(f"{future} was cancelled")
        request.frames = [encode(Refuse(number, command.lane, command.seq, command.kind, error.info)), b""]
        self._cancelled.discard(future)
        if waiting := self._futures.pop(future, None):
            waiting.reject(error)
        return True

    def was_read(self, future: FutureId) -> None:
        """A result that came over this connection has reached whom it was for; said with the next heartbeat."""
        self._were_read.append(future)

    def _start(self, message: Any, payload: bytes, on_error: Callable[[LorryError], None] | None = None) -> Request:
        if self._closed:
            raise ConnectionLostError(f"the connection to {self._address} is closed")
        if len(header := encode(message)) > MAX_HEADER_BYTES:
            problem = f"what the request says beside its data has {len(header):,} bytes, the limit is"
            raise MessageTooLargeError(f"{problem} {MAX_HEADER_BYTES:,}")
        request = Request([header, payload], on_error=on_error)
        self._requests[message.request] = request
        if self._welcome:
            self._link.send(request.frames)
        return request

    async def _answer(self, request: Request) -> bytes:
        await request.answered.wait()
        if request.error is not None:
            raise request.error
        return request.payload

    # The conversation ------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Say hello and wait for the welcome. Raises AuthenticationError, ProtocolError, ConnectionLostError, and
        TooManyWaitingError where the server told it to come again until its time was over."""
        self._channel.on_reconnect = self._greet
        self._hello()
        with anyio.move_on_after(self._timeout_s):
            await self._welcomed.wait()
        if self._refused is not None:
            raise self._refused
        if self._welcome is None:
            raise self._put_off or ConnectionLostError(f"no answer from {self._address} within {self._timeout_s:g} s")

    async def receive(self) -> None:
        while True:
            for frames in await self._channel.receive():
                self._heard = anyio.current_time()
                for message in self._link.arrived(frames):
                    self._read(message)

    def _read(self, frames: list[bytes]) -> None:
        message = decode(frames[0], ToClient, MAX_HEADER_BYTES)
        if isinstance(message, Streamed):
            self._streamed(message, frames[1:])
        elif isinstance(message, NewsCame):
            self._link.confirm()
            self._followings.came(message.of, frames[-1])
        else:
            self._handle(message, frames[-1])

    def _streamed(self, message: Streamed, payloads: list[bytes]) -> None:
        for future, pieces in zip(message.futures, payloads, strict=True):
            if isinstance(stream := self._futures.get(future), SampleStream):
                stream.made(pieces)

    def _handle(self, message: Welcome | Unknown | Answer | Failed | Resolved | Pong, payload: bytes) -> None:
        match message:
            case Resolved(future, error):
                self._cancelled.discard(future)
                self._send_held(LaneId(future.rpartition(":")[0]))
                if waiting := self._futures.pop(future, None):
                    waiting.reject(revive(error)) if error else waiting.resolve(payload)
            case Answer(number):
                if request := self._requests.pop(number, None):
                    request.payload = payload
                    request.answered.set()
            case Failed(number, error):
                self._failed(number, revive(error))
            case Welcome():
                if self._welcome is None:
                    self._refused = None
                    self._welcome = message
                    self._welcomed.set()
                    self._link.open(message.session)
                    self._resume()
            case Unknown(tag):
                if self._link.is_tagged(tag):
                    self._welcome = None
                    self._link.open(None)
                    self._hello()
            case Pong():
                at_most = sys.maxsize if self._found_disk_full else 1
                self._found_disk_full = False
                for lane in list(self._held):
                    self._send_held(lane, at_most)

    def _failed(self, number: int | None, error: LorryError) -> None:
        if number is None and error.after_s is not None and not self._relays:
            self._put_off = error  # it says hello again, until there is a welcome
        elif number is None:
            self._refused = error
            self._welcomed.set()
            self._cancelled.clear()
            for number in list(self._requests):
                self._failed(number, error)
            for future in list(self._futures.values()):
                future.reject(error)
            self._futures.clear()
            self._followings.fail(error)
        elif isinstance(error, _COME_AGAIN) and not self._relays and number in self._requests:
            if isinstance(error, StorageUnavailableError):
                if not self._held:
                    log.warning("waiting: %s", error)
                self._found_disk_full = True
            if error.after_s is not None:
                self._due[number] = anyio.current_time() + error.after_s
                self._has_due.set()
            else:
                self._held.setdefault(self._requests[number].lane, []).append(number)
            self._give_up(number)
        elif request := self._requests.pop(number, None):
            if command := request.command:
                self._cancelled.discard(future_id(command.lane, command.seq))
            request.error = error
            request.answered.set()
            if request.on_error:
                request.on_error(error)

    def _send_held(self, lane: LaneId | None, at_most: int = 1) -> None:
        """Something of this lane is over, or the disk may have room again: what was sent first comes again first."""
        held = sorted(self._held.pop(lane, []))
        if held[at_most:]:
            self._held[lane] = held[at_most:]
        for number in held[:at_most]:
            if number in self._requests:
                self._link.send(self._requests[number].frames)

    def _hello(self) -> None:
        self._channel.send([encode(Hello(VERSION, self._api_key, f"lorry on {platform.node()}", self._relays))])

    def _resume(self) -> None:
        self._held.clear()
        self._due.clear()
        for request in self._requests.values():
            self._link.send(request.frames)
        for start in range(0, len(futures := list(self._futures)), _NAMES_AT_ONCE):
            self._link.send([encode(Watch(futures[start : start + _NAMES_AT_ONCE]))])
        self._followings.resume()

    async def come_again(self) -> None:
        """What the broker told to come again after some time."""
        while True:
            with anyio.CancelScope(deadline=min(self._due.values(), default=math.inf)):
                await self._has_due.wait()
            self._has_due = anyio.Event()
            for number in sorted(number for number, at in self._due.items() if at <= anyio.current_time()):
                del self._due[number]
                if number in self._requests:
                    self._link.send(self._requests[number].frames)

    async def heartbeat(self) -> None:
        """Tell the broker that we live; give up a connection on which it has been silent for too long."""
        while True:
            interval = self._welcome.heartbeat_s if self._welcome else 1.0
            await anyio.sleep(interval)
            if anyio.current_time() - self._heard > 3 * interval:
                self._channel.reconnect()
                self._heard = anyio.current_time()
            self._greet()
            for start in range(0, len(read := self._were_read), _NAMES_AT_ONCE):
                self._start(Read(self.next_request(), read[start : start + _NAMES_AT_ONCE]), b"")
            self._were_read = []

    def _greet(self) -> None:
        """Whatever was lost before shows in the answer."""
        self._link.beat([encode(Ping())]) if self._welcome else self._hello()

    def close(self) -> None:
        self._closed = True
        if self._welcome:
            self._link.send([encode(Goodbye())])
        error = ConnectionLostError(f"the connection to {self._address} was closed")
        for number in list(self._requests):
            self._failed(number, error)
        for future in self._futures.values():
            future.reject(error)
        self._followings.fail(error)


@asynccontextmanager
async def open_connection(
    address: str, api_key: str, server_key: str | None = None, timeout_s: float = 10.0, *, relays: bool = False
) -> AsyncGenerator[Connection]:
    """A connection for as long as the block lasts. What has not resolved by its end raises ConnectionLostError."""
    identity = b"client-" + secrets.token_bytes(16)
    with sockets.connect(address, server_key.encode() if server_key else None, identity) as channel:
        connection = Connection(channel, address, api_key, timeout_s, relays=relays)
        async with background_tasks() as tasks:
            tasks.start_soon(connection.receive)
            tasks.start_soon(connection.heartbeat)
            tasks.start_soon(connection.come_again)
            await connection.open()
            try:
                yield connection
            finally:
                connection.close()
