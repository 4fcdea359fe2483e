"""Whose keys are tried at the broker: a wrong one costs a connection there, so who shows many is told to wait.

A key that was right is let in whatever others do who come from the same address. A key is a random number: one that is
wrong cannot be right a moment later, nor can one that was just made have been tried before.
"""

import hashlib
from collections.abc import Callable

import anyio

from ..wire.attempts import Attempts, Lately, Pace
from ..wire.errors import AuthenticationError, TooManyTriesError

_KEYS_AT_MOST = 10_000
_REFUSED_EVERY_S = 0.005
_REFUSED_WITHIN_S = 5.0
_WRONG_FOR_S = 10.0
"""A broker that serves other data from now on, a backup, may know it."""


class Guests:
    def __init__(self, now: Callable[[], float], attempts: Attempts | None = None) -> None:
        self._now, self._attempts = now, Attempts() if attempts is None else attempts
        self._refusals = Pace(_REFUSED_EVERY_S, _REFUSED_WITHIN_S)
        self._right = Lately[bool](_KEYS_AT_MOST)
        self._wrong = Lately[AuthenticationError](_KEYS_AT_MOST, _WRONG_FOR_S)

    async def try_(self, key: str, peer: str) -> None:
        """The broker may be asked about the key; say afterwards what it `was_`. Raises TooManyTriesError, to one peer
        200 times a second, so that trying as fast as it goes takes no time from others; and AuthenticationError for a
        key that was wrong a moment ago."""
        if self._right.of(_name(key), self._now()):
            return
        if after_s := self._attempts.take(peer, self._now()):
            await anyio.sleep(self._refusals.wait_s(peer, self._now()))
            raise TooManyTriesError(f"too many wrong keys came from {peer}", field="api_key", after_s=after_s)
        if error := self._wrong.of(_name(key), self._now()):
            raise AuthenticationError(str(error), field=error.field)

    def was_right(self, key: str, peer: str) -> None:
        if not self._right.of(_name(key), self._now()):
            self._attempts.give_back(peer, self._now())
        self._right.say(_name(key), True, self._now())

    def was_wrong(self, key: str, error: AuthenticationError) -> None:
        """Or is from now on."""
        self._right.forget(_name(key))
        self._wrong.say(_name(key), error, self._now())

    def was_not_tried(self, key: str, peer: str) -> None:
        """The broker did not answer."""
        if not self._right.of(_name(key), self._now()):
            self._attempts.give_back(peer, self._now())


def _name(key: str) -> str:
    """A key is kept nowhere."""
    return hashlib.sha256(key.encode()).hexdigest()
