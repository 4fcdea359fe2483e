"""News of what goes on, as they are pushed: for any number of readers of one connection, each at its own pace."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import anyio
from msgspec import structs

from ..wire.codec import decode
from ..wire.errors import ConnectionLostError, LorryError
from ..wire.metrics import size_of
from ..wire.news import BYTES_AT_MOST, POINTS_AT_MOST, Follow, Followed, News, Unfollow
from .requests import Request

log = logging.getLogger("lorry")

Start: TypeAlias = Callable[[Any, Callable[[LorryError], None] | None], Request]
"""Sends a request, and tells of its refusal."""


class Feed:
    """`async for item in feed`. A reader that is slow finds what it has not read yet as one item; where that would be
    too much, without its points, and `missed`. Iterating raises what ended the connection."""

    def __init__(self) -> None:
        self._unread: News | None = None
        self._error: LorryError | None = None
        self._came = anyio.Event()
        self._missed = False

    async def __aiter__(self) -> AsyncIterator[News]:
        while True:
            while self._unread is not None:
                item, self._unread = self._unread, None
                yield item
            if self._error is not None:
                raise self._error
            self._came = anyio.Event()
            await self._came.wait()

    def came(self, news: News) -> None:
        if self._missed:
            self._missed, news = False, structs.replace(news, missed=True)
        self._unread = news if self._unread is None else merged(self._unread, news)
        self._came.set()

    def missed(self) -> None:
        """What comes next is not all that there was."""
        self._missed = True

    def fail(self, error: LorryError) -> None:
        self._error = error
        self._came.set()


class Followings:
    """All that one connection follows. While somebody reads, the broker is asked for it once, and again after a
    restart; what comes first then is `missed`."""

    def __init__(self, next_request: Callable[[], int], start: Start) -> None:
        self._next_request, self._start = next_request, start
        self._feeds: dict[Followed, list[Feed]] = {}
        self._last: dict[Followed, News] = {}

    @asynccontextmanager
    async def follow(self, of: Followed) -> AsyncGenerator[Feed]:
        """News for as long as the block lasts, the first at once. Raises PermissionDeniedError."""
        feed, feeds = Feed(), self._feeds.setdefault(of, [])
        feeds.append(feed)
        try:
            if (last := self._last.get(of)) is not None:
                feed.came(structs.replace(last, points=[], changed=[], missed=False))
            else:
                request = self._start(Follow(self._next_request(), of), None)
                await request.answered.wait()
                if request.error is not None:
                    raise request.error
            yield feed
        finally:
            feeds.remove(feed)
            if not feeds:
                del self._feeds[of]
                self._last.pop(of, None)
                with suppress(ConnectionLostError):
                    self._start(Unfollow(self._next_request(), of), None)

    def came(self, of: Followed, payload: bytes) -> None:
        """Called by the connection, as are those that follow. What cannot be read ends nothing: it was missed."""
        if feeds := self._feeds.get(of):
            last = self._last.get(of)
            try:
                news = decode(payload, News)
            except LorryError as error:
                log.warning("news cannot be read: %s", error)
                for feed in feeds:
                    feed.missed()
                    if last is not None:
                        feed.came(last)
                return
            overview = news.overview if news.overview is not None or last is None else last.overview
            self._last[of] = structs.replace(news, points=[], changed=[], overview=overview)
            for feed in feeds:
                feed.came(news)

    def resume(self) -> None:
        """With a broker that knows nothing of it."""
        for of, feeds in self._feeds.items():
            for feed in feeds:
                feed.missed()
            self._start(Follow(self._next_request(), of), partial(self._fail, of))

    def fail(self, error: LorryError) -> None:
        """The connection is over."""
        for of in self._feeds:
            self._fail(of, error)

    def _fail(self, of: Followed, error: LorryError) -> None:
        for feed in self._feeds.get(of, ()):
            feed.fail(error)


def merged(before: News, after: News) -> News:
    """Two items as one. Pure."""
    points = {(point.run, point.source, point.step): point for point in (*before.points, *after.points)}
    fits = len(points) <= POINTS_AT_MOST and sum(size_of(p.values) for p in points.values()) <= BYTES_AT_MOST
    return News(
        at=after.at,
        points=list(points.values()) if fits else [],
        changed=sorted({*before.changed, *after.changed}),
        waiting=after.waiting,
        missed=before.missed or after.missed or not fits,
        overview=before.overview if after.overview is None else after.overview,
    )
