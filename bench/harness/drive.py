"""Sends a workload's requests when they are due, and notes what becomes of each."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import anyio

from .arrivals import arrivals
from .records import Record
from .requests import Batch, Prompt, Request, Requests
from .workload import Closed, Tenant, Workload, names_of

Tell = Callable[[Record], None]
Look = Callable[[float], Awaitable[None]]
"""Looks at what the server does, at so many seconds of the run."""
LOOKS_EVERY_S = 1.0
NOT_ANSWERED = "not answered in time"
AFTER_A_FAILURE_S = 1.0
"""A closed loop waits so long at least: a server that refuses at once is not asked as fast as it can refuse."""
_MESSAGE_CHARACTERS = 300


@dataclass(slots=True)
class Marks:
    """What a server says of a request while it is under way, with the time when it said so."""

    clock: Callable[[], float]
    acknowledged_s: float | None = None
    token_s: list[float] = field(default_factory=list[float])

    def acknowledged(self) -> None:
        self.acknowledged_s = self.clock()

    def token(self) -> None:
        self.token_s.append(self.clock())


class Seat(Protocol):
    """One tenant's place at a server, with a run of its own. Whatever either raises, the request has failed."""

    async def train(self, batch: Batch, marks: Marks) -> None: ...

    async def sample(self, prompt: Prompt, marks: Marks) -> int:
        """How many tokens were sampled."""
        ...


class Server(Protocol):
    def seat(self, tenant: Tenant, name: str) -> AbstractAsyncContextManager[Seat]:
        """Raises where the tenant cannot be served at all."""
        ...


async def drive(
    workload: Workload, server: Server, tell: Tell, patience_s: float = 60.0, look: Look | None = None
) -> list[Record]:
    """All that was sent, in the order of its end; `tell` hears of each at once. `look` is called now and then.

    What is unanswered `patience_s` after the last request was due has failed, and is cancelled.
    """
    records = list[Record]()

    def note(record: Record) -> None:
        records.append(record)
        tell(record)

    async with _seats(workload, server) as seats:
        started = anyio.current_time()
        run = _Run(workload, lambda: anyio.current_time() - started, note)
        async with anyio.create_task_group() as beside:
            if look is not None:
                beside.start_soon(run.look, look)
            with anyio.move_on_after(run.ends_s + patience_s):
                async with anyio.create_task_group() as tasks:
                    for tenant, name, seat in seats:
                        tasks.start_soon(run.tenant, tenant, name, seat)
            beside.cancel_scope.cancel()
    return records


@asynccontextmanager
async def _seats(workload: Workload, server: Server) -> AsyncGenerator[list[tuple[Tenant, str, Seat]]]:
    async with AsyncExitStack() as stack:
        yield [
            (tenant, name, await stack.enter_async_context(server.seat(tenant, name)))
            for tenant in workload.tenants
            for name in names_of(tenant)
        ]


class _Run:
    def __init__(self, workload: Workload, clock: Callable[[], float], note: Tell) -> None:
        self._workload, self._clock, self._note = workload, clock, note
        self.ends_s = workload.warm_up_s + workload.duration_s

    async def look(self, look: Look) -> None:
        while True:
            await look(self._clock())
            await anyio.sleep(LOOKS_EVERY_S)

    async def tenant(self, tenant: Tenant, name: str, seat: Seat) -> None:
        numbered = _Numbered(Requests(self._workload, tenant, name))
        async with anyio.create_task_group() as tasks:
            if isinstance(tenant.arrival, Closed):
                closed = tenant.arrival
                for i in range(closed.concurrency):
                    first_s = closed.ramp_up_s * i / closed.concurrency
                    tasks.start_soon(self._loop, closed, first_s, name, seat, numbered)
            else:
                for due_s in arrivals(tenant.arrival, Random(f"{self._workload.seed}/{name}/arrivals")):
                    if due_s >= self.ends_s:
                        break
                    numbered_request = numbered.next()  # made before it is due, as far as there is time
                    await anyio.sleep(max(0.0, due_s - self._clock()))
                    tasks.start_soon(self._request, due_s, name, seat, *numbered_request)

    async def _loop(self, closed: Closed, first_s: float, name: str, seat: Seat, numbered: "_Numbered") -> None:
        await anyio.sleep(first_s)
        while True:
            numbered_request = numbered.next()
            if (due_s := self._clock()) >= self.ends_s:
                break
            well = await self._request(due_s, name, seat, *numbered_request)
            await anyio.sleep(closed.think_s if well else max(closed.think_s, AFTER_A_FAILURE_S))

    async def _request(self, due_s: float, name: str, seat: Seat, number: int, request: Request) -> bool:
        """Whether it was answered well."""
        marks, sent_s = Marks(self._clock), self._clock()
        tokens, error, message = 0, NOT_ANSWERED, ""
        try:
            if isinstance(request, Batch):
                await seat.train(request, marks)
                tokens = request.tokens
            else:
                tokens = await seat.sample(request, marks)
            error = None
        except Exception as caught:  # whatever a server's own library raises is counted, and the others go on
            error, message = type(caught).__name__, str(caught)[:_MESSAGE_CHARACTERS]
        finally:
            self._note(
                Record(
                    tenant=name,
                    kind="train" if isinstance(request, Batch) else "sample",
                    number=number,
                    due_s=due_s,
                    sent_s=sent_s,
                    done_s=self._clock(),
                    tokens=tokens,
                    prompt_tokens=0 if isinstance(request, Batch) else len(request.tokens),
                    acknowledged_s=marks.acknowledged_s,
                    token_s=marks.token_s,
                    error=error,
                    message=message,
                    is_warm_up=due_s < self._workload.warm_up_s,
                )
            )
        return error is None


class _Numbered:
    """A tenant's requests, each once, whoever takes it."""

    def __init__(self, requests: Requests) -> None:
        self._all: Iterator[tuple[int, Request]] = ((n, requests.request(n)) for n in range(2**62))

    def next(self) -> tuple[int, Request]:
        return next(self._all)
