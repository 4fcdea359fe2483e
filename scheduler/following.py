"""News, sent to those who follow: at most one message in a while, made once for all who are to have the same, and
nothing more to whoever has not confirmed the one before."""

from collections.abc import Callable
from dataclasses import dataclass

import anyio
import anyio.lowlevel
from msgspec import structs

from ..storage.rows import KeyRow
from ..wire.codec import encode
from ..wire.news import Follow, Followed, News, Unfollow
from ..wire.overview import Overview
from .access.sessions import Session, Sessions
from .client_post import ClientPost
from .commands import Commands
from .observing.newsroom import DEPLOYMENT, Whose


@dataclass(slots=True)
class _Follower:
    """The last message was its `number`th. It is `fresh` until it has had one; `missed` one that it did not get."""

    session: Session
    number: int = 0
    fresh: bool = True
    missed: bool = False

    @property
    def keeps_up(self) -> bool:
        return self.session.link.has_room and self.session.link.is_confirmed(self.number)


@dataclass(slots=True)
class _Told:
    """What was told last, apart from moments."""

    waiting: int = -1
    overview: Overview | None = None


class Following:
    """`is_over` says whether a key opens nothing any more. News come `news_s` seconds apart."""

    def __init__(
        self,
        commands: Commands,
        post: ClientPost,
        sessions: Sessions,
        is_over: Callable[[KeyRow], bool],
        now: Callable[[], float],
        news_s: float,
    ) -> None:
        self._newsroom, self._waiting, self._look = commands.newsroom, commands.waiting, commands.overview.look
        self._post, self._sessions, self._is_over = post, sessions, is_over
        self._now, self._news_s = now, news_s
        self._followers: dict[Whose, dict[bytes, _Follower]] = {}
        self._told: dict[Whose, _Told] = {}
        self._behind: dict[bytes, set[Whose]] = {}
        self._stirred = anyio.Event()
        self._newsroom.on_news = self._stir

    def hear(self, session: Session, message: Follow | Unfollow) -> None:
        whose = _whose(session, message.of)
        if isinstance(message, Unfollow):
            self._forget(session, whose)
        else:
            followers = self._followers.setdefault(whose, {})
            known = followers.get(session.connection)
            number = known.number if known is not None and known.session is session else 0
            followers[session.connection] = _Follower(session, number)
            self._told.setdefault(whose, _Told())
            self._newsroom.follow(whose)
        self._post.answer(session.connection, message.request)

    def left(self, session: Session) -> None:
        for of in ("own", "deployment"):
            self._forget(session, _whose(session, of))

    def heard(self, session: Session) -> None:
        """Something came from it, and with that what it has received."""
        for whose in tuple(self._behind.get(session.connection, ())):
            follower = self._followers.get(whose, {}).get(session.connection)
            if follower is None or follower.keeps_up:
                self._caught_up(session.connection, whose)
                self._newsroom.stir(whose)

    def __len__(self) -> int:
        return sum(map(len, self._followers.values()))

    async def run(self) -> None:
        """Tell what there is, until cancelled. Nobody wakes up while there is nothing."""
        while True:
            await self._stirred.wait()
            self._stirred = anyio.Event()
            for whose in self._newsroom.due():
                if self._followers.get(whose):
                    await self._tell(whose)
                await anyio.lowlevel.checkpoint()
            await anyio.sleep(self._news_s)

    def _stir(self) -> None:
        self._stirred.set()

    async def _tell(self, whose: Whose) -> None:
        overview = await self._look() if whose is DEPLOYMENT else None
        if not (followers := list(self._followers.get(whose, {}).values())):
            return
        gathered, told, waiting = self._newsroom.take(whose), self._told[whose], self._waiting(whose)
        looks_new = overview is not None and not _is_same(overview, told.overview)
        is_news = bool(gathered.points or gathered.changed or gathered.missed) or looks_new or waiting != told.waiting
        told.waiting, told.overview = waiting, overview
        if not looks_new and not any(follower.fresh or follower.missed for follower in followers):
            overview = None
        news = News(
            self._now(), list(gathered.points.values()), sorted(gathered.changed), waiting, gathered.missed, overview
        )
        encoded: dict[bool, bytes] = {}
        for follower in followers:
            session = follower.session
            if self._sessions.at(session.connection) is not session or self._is_over(session.key):
                continue
            if not follower.keeps_up:
                self._falls_behind(follower, whose, is_news)
            elif is_news or follower.fresh or follower.missed:
                missed = news.missed or follower.missed
                if missed not in encoded:
                    encoded[missed] = encode(structs.replace(news, missed=missed))
                follower.number = self._post.news(session, _of(whose), encoded[missed])
                follower.fresh = follower.missed = False

    def _falls_behind(self, follower: _Follower, whose: Whose, is_news: bool) -> None:
        follower.missed = follower.missed or is_news
        if follower.missed or follower.fresh:
            self._behind.setdefault(follower.session.connection, set()).add(whose)

    def _forget(self, session: Session, whose: Whose) -> None:
        self._caught_up(session.connection, whose)
        followers = self._followers.get(whose, {})
        followers.pop(session.connection, None)
        if not followers and self._followers.pop(whose, None) is not None:
            del self._told[whose]
            self._newsroom.unfollow(whose)

    def _caught_up(self, connection: bytes, whose: Whose) -> None:
        if behind := self._behind.get(connection):
            behind.discard(whose)
            if not behind:
                del self._behind[connection]


def _whose(session: Session, of: Followed) -> Whose:
    return session.tenant if of == "own" else DEPLOYMENT


def _of(whose: Whose) -> Followed:
    return "deployment" if whose is DEPLOYMENT else "own"


def _is_same(overview: Overview, before: Overview | None) -> bool:
    return before is not None and overview == structs.replace(before, at=overview.at)
