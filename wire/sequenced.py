"""Messages that arrive once and in order, whatever a connection loses, repeats, delays or reorders. Pure, but for the
`send` that it is given.

Each end numbers what it sends and keeps it until the other end says that it has it. A missing number shows at once
where a later one arrives, and otherwise at the next heartbeat, which says how many were sent; it is asked for and sent
again.
"""

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

_STAMP = struct.Struct(">BB8sQQ")
_MARK = 0xC1
"""Begins no MessagePack, so that a stamp is never taken for a header, nor a header for a stamp."""
CONFIRMED_EVERY = 4 << 20
"""Bytes: who has received so many says so, though it has nothing else to say."""
UNCONFIRMED_AT_MOST = 32 << 20
"""Bytes under way to one end, beyond which what can wait is to wait. Beyond twice as many, an end that `bounds` its
memory takes nothing new from the other, until that has read."""
HELD_AT_MOST = 256
HELD_BYTES_AT_MOST = 32 << 20
"""Messages that wait for an earlier one. What comes beyond is dropped, and asked for when its turn comes."""
ANSWERED_EVERY = 8
"""Of the times that an end asks for what it had been sent before, once it has asked in vain for some."""


class Kind(IntEnum):
    """`MESSAGE` has a place in the order, and its number is that; a `BEAT` has none, and its number is how many were
    sent; `HAVE` says nothing but what was `received`, and `AGAIN` that what is behind it is to be sent again."""

    MESSAGE = 0
    BEAT = 1
    AGAIN = 2
    HAVE = 3


_KINDS = {int(kind): kind for kind in Kind}  # of every message one is looked up, which an Enum takes its time for


@dataclass(frozen=True, slots=True)
class Stamp:
    """The first frame of what travels over a link. `received`: its sender has all up to that number."""

    kind: Kind
    tag: bytes
    number: int
    received: int

    def encode(self) -> bytes:
        return _STAMP.pack(_MARK, self.kind, self.tag, self.number, self.received)


def stamp_of(frames: Sequence[bytes]) -> Stamp | None:
    """None for a message that travels outside of any link: a greeting, or a refusal."""
    if not frames or len(frames[0]) != _STAMP.size or frames[0][0] != _MARK:
        return None
    _, kind, tag, number, received = _STAMP.unpack(frames[0])
    known = _KINDS.get(kind)
    return None if known is None else Stamp(known, tag, number, received)


class Link:
    """One end. Both begin at zero when they are opened, under the same name: what comes under another is not theirs.

    One that `bounds` its memory does so against another end that asks for much and reads nothing.
    """

    def __init__(
        self, send: Callable[[Sequence[bytes]], None], name: str | None = None, *, bounds: bool = False
    ) -> None:
        self._send, self._bounds = send, bounds
        self.open(name)

    def open(self, name: str | None) -> None:
        """Begin anew, or with None: not yet. What was sent before and not confirmed is forgotten."""
        self.name = name
        self.tag = hashlib.blake2b((name or "").encode(), digest_size=8).digest()
        self._sent = 0
        self._unconfirmed: deque[tuple[int, Sequence[bytes]]] = deque()
        self._unconfirmed_bytes = 0
        self._received = 0
        self._untold_bytes = 0
        self._held: dict[int, list[bytes]] = {}
        self._held_bytes = 0
        self._asked_after = -1
        self._turned_away = False
        self._asked_in_vain = 0

    def is_of(self, stamp: Stamp) -> bool:
        return self.is_tagged(stamp.tag)

    def is_tagged(self, tag: bytes) -> bool:
        return self.name is not None and tag == self.tag

    @property
    def has_room(self) -> bool:
        """Whether the other end keeps up with what is sent to it."""
        return self._unconfirmed_bytes < UNCONFIRMED_AT_MOST

    @property
    def _is_full(self) -> bool:
        return self._bounds and self._unconfirmed_bytes >= 2 * UNCONFIRMED_AT_MOST

    def send(self, frames: Sequence[bytes]) -> int:
        """Send a message that has its place in the order, and return that."""
        self._sent += 1
        self._unconfirmed_bytes += _size(frames)
        self._unconfirmed.append((self._sent, frames))
        self._stamped(Kind.MESSAGE, self._sent, frames)
        return self._sent

    def is_confirmed(self, number: int) -> bool:
        """Whether the other end has said that it has this message."""
        return not self._unconfirmed or number < self._unconfirmed[0][0]

    def confirm(self) -> None:
        """Say now what has come, and not only with what is said next."""
        self._stamped(Kind.HAVE, 0, ())

    def beat(self, frames: Sequence[bytes]) -> None:
        """Send a message that may be lost, and that shows the other end what it has missed."""
        self._stamped(Kind.BEAT, self._sent, frames)

    def arrived(self, frames: list[bytes]) -> list[list[bytes]]:
        """What may be read of what has come: all that came bare, and what was sent over this link when its turn has
        come."""
        if (stamp := stamp_of(frames)) is None:
            return [frames]
        return self.receive(stamp, frames[1:]) if self.is_of(stamp) else []

    def receive(self, stamp: Stamp, frames: list[bytes]) -> list[list[bytes]]:
        """What may be read now: nothing, this message, or it and those that waited for it."""
        self._confirm(stamp.received)
        match stamp.kind:
            case Kind.MESSAGE:
                return self._in_order(stamp.number, frames)
            case Kind.BEAT:
                if stamp.number > self._received and not self._is_full:
                    self._ask()
                return [frames]
            case Kind.AGAIN:
                self._send_again()
                return []
            case Kind.HAVE:
                return []

    def _confirm(self, received: int) -> None:
        while self._unconfirmed and self._unconfirmed[0][0] <= received:
            self._unconfirmed_bytes -= _size(self._unconfirmed.popleft()[1])
            self._asked_in_vain = 0
        if self._turned_away and not self._is_full:
            self._turned_away = False
            self._ask()

    def _send_again(self) -> None:
        """All that is under way, for more may be missing than was noticed. Who asks again and again, and never has any
        more than before, is answered the first, second, fourth time, and then every eighth."""
        self._asked_in_vain += 1
        if self._asked_in_vain in (1, 2, 4) or self._asked_in_vain % ANSWERED_EVERY == 0:
            for number, missed in self._unconfirmed:
                self._stamped(Kind.MESSAGE, number, missed)

    def _in_order(self, number: int, frames: list[bytes]) -> list[list[bytes]]:
        if number <= self._received:
            return []
        if self._is_full:
            self._turned_away = True
            return []
        self._hold(number, frames)
        due: list[list[bytes]] = []
        while (following := self._held.pop(self._received + 1, None)) is not None:
            self._received += 1
            self._held_bytes -= _size(following)
            self._untold_bytes += _size(following)
            due.append(following)
        if self._untold_bytes >= CONFIRMED_EVERY:
            self.confirm()
        if number > self._received and self._asked_after != self._received:
            self._ask()
        return due

    def _hold(self, number: int, frames: list[bytes]) -> None:
        is_next, size = number == self._received + 1, _size(frames)
        within = number <= self._received + HELD_AT_MOST and self._held_bytes + size <= HELD_BYTES_AT_MOST
        if number not in self._held and (is_next or within):
            self._held[number] = frames
            self._held_bytes += size

    def _ask(self) -> None:
        self._asked_after = self._received
        self._stamped(Kind.AGAIN, 0, ())

    def _stamped(self, kind: Kind, number: int, frames: Sequence[bytes]) -> None:
        self._untold_bytes = 0
        self._send([Stamp(kind, self.tag, number, self._received).encode(), *frames])


def _size(frames: Sequence[bytes]) -> int:
    return sum(map(len, frames))
