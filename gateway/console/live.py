"""What is pushed to a page while it is seen: news of the broker's, as server-sent events. Nothing polls.

The answer ends by itself after some minutes: the browser comes again, and has its sign-in renewed as by any page.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal, TypeAlias, get_args

import anyio
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...wire.admin_messages import Ending, LookAtEndings
from ...wire.errors import InvalidRequestError, LorryError
from ...wire.news import Followed, News
from ...wire.overview import Overview
from ..chat.endpoint import Reply, hung_up
from .curves import RUNS_AT_ONCE, told
from .deployment import Seen, by_tenant
from .listing import Listed
from .orders import ask
from .rendering import fragment
from .runs import find, state_of
from .visiting import Visitor, visiting
from .waiting import jobs_of

Page: TypeAlias = Literal["runs", "run", "waiting", "checkpoints", "deployment"]

_LASTS_S = 900.0
_ASKS_EVERY_S = {"run": 10.0, "waiting": 2.0}
"""Where news say only that something is worth asking for again."""
_PLOTTED = ("runs", "run")
_PING = b": there\n\n"
_CHANGED = {"runs": "Runs have changed.", "checkpoints": "Checkpoints have changed."}


def event(name: str, data: Any) -> bytes:
    """JSON has no line break outside of what it escapes."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class Live:
    """An ASGI application: one page's news."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with visiting(request) as visitor:
            page, runs = _asked(request)
            if request.method == "HEAD":
                await Response()(scope, receive, send)
                return
            watched = [await find(visitor.broker, run) for run in runs] if page == "run" else []
            stream = _Stream(visitor, page, runs, watched)
            patience_s = request.app.state.gateway.config.http.slow_after_s
            with suppress(ClientDisconnect):
                await stream.send_to(Reply(scope, send, patience_s), request)


def _asked(request: Request) -> tuple[Page, frozenset[str]]:
    """Raises InvalidRequestError."""
    said, runs = request.query_params.get("page", ""), frozenset(request.query_params.getlist("run"))
    for page in get_args(Page):
        if said == page and len(runs) <= RUNS_AT_ONCE:
            return page, runs
    raise InvalidRequestError.of("page", said, f"one of {', '.join(get_args(Page))}, with up to {RUNS_AT_ONCE} runs")


class _Stream:
    def __init__(self, visitor: Visitor, page: Page, runs: frozenset[str], watched: Sequence[Listed]) -> None:
        self._visitor, self._page, self._runs, self._watched = visitor, page, runs, watched
        self._seen = Seen()
        self._endings: list[Ending] | None = None
        self._stirred = anyio.Event()
        self._stirred.set()  # between the page and its stream something may have changed

    async def send_to(self, reply: Reply, request: Request) -> None:
        """Until the reader is gone, or some minutes are over. Raises TimeoutError where the broker does not answer."""
        of: Followed = "deployment" if self._page == "deployment" else "own"
        async with AsyncExitStack() as stack:
            with anyio.fail_after(request.app.state.gateway.config.answer_within_s):
                feed = await stack.enter_async_context(self._visitor.broker.connection.follow(of))
            await reply.open_stream()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hung_up, request, tasks.cancel_scope)
                tasks.start_soon(_keep_alive, reply, tasks.cancel_scope)
                if self._page in _ASKS_EVERY_S and (self._page != "run" or len(self._watched) == 1):
                    tasks.start_soon(self._refreshing, reply, tasks.cancel_scope)
                with suppress(LorryError, TimeoutError, ClientDisconnect), anyio.move_on_after(_LASTS_S):
                    async for news in feed:
                        async for each in self._events(news):
                            await reply.event(each)
                tasks.cancel_scope.cancel()
            await reply.close()

    async def _events(self, news: News) -> AsyncIterator[bytes]:
        if news.missed:
            yield event("again", None)
        points = told(news.points, self._runs or None) if self._page in _PLOTTED else []
        if points:
            yield event("points", points)
        if self._page in _CHANGED and self._page in news.changed:
            yield event("changed", _CHANGED[self._page])
        if news.missed or "jobs" in news.changed or (points and self._page == "run"):
            self._stirred.set()
        if news.overview is not None and self._page == "deployment":
            yield await self._deployment(news.overview, "actors" in news.changed)

    async def _refreshing(self, reply: Reply, scope: anyio.CancelScope) -> None:
        """What has to be asked for, when there is reason to, and not more often than that."""
        try:
            while True:
                await self._stirred.wait()
                self._stirred = anyio.Event()
                await reply.event(await self._refreshed())
                await anyio.sleep(_ASKS_EVERY_S[self._page])
        except (LorryError, TimeoutError, ClientDisconnect):
            scope.cancel()  # the browser comes again, and is told what is wrong

    async def _refreshed(self) -> bytes:
        broker = self._visitor.broker
        if self._page == "waiting":
            return event("fragment", {"id": "jobs", "html": fragment("jobs_part.html", jobs=await jobs_of(broker))})
        (run,) = self._watched
        html = fragment("run_state_part.html", **await state_of(broker, run))
        return event("fragment", {"id": "state", "html": html})

    async def _deployment(self, overview: Overview, ended: bool) -> bytes:
        if self._endings is None or ended:
            self._endings = await ask(self._visitor, LookAtEndings(), list[Ending])
        html = fragment(
            "deployment_part.html",
            overview=overview,
            actors=self._seen.actors(overview, self._endings),
            queues=by_tenant(overview.queues),
            rates=self._seen.rates(overview),
        )
        self._seen.add(overview)
        return event("fragment", {"id": "deployment", "html": html})


async def _keep_alive(reply: Reply, scope: anyio.CancelScope) -> None:
    try:
        await reply.keep_alive(_PING)
    except ClientDisconnect:
        scope.cancel()


ROUTE = Route("/live", Live(), methods=["GET"])
