"""For administrators: actors, what waits for them and whose it is; how actors ended; drain."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.responses import RedirectResponse, Response

from ...wire.admin_messages import Ending, LookAtEndings, LookOver, StartDrain
from ...wire.ids import ActorId
from ...wire.overview import ActorLoad, Overview, QueueLoad
from ...wire.rates import Busy, busy, tokens_per_s
from ...wire.types import UsageKind
from .forms import FormOf
from .orders import ask, tell
from .rendering import page
from .visiting import PATH, VisitorOf

router = APIRouter()

_REMEMBERED = 30


@dataclass(frozen=True, slots=True)
class Actor:
    """`ending` is its last one, of a process of this name that was there before."""

    load: ActorLoad
    busy: Busy | None
    ending: Ending | None


@dataclass(frozen=True, slots=True)
class TenantQueue:
    tenant: str
    commands: int
    tokens: int
    queues: Sequence[QueueLoad]


class Seen:
    """What was seen before, so that it can be said how fast things go."""

    def __init__(self) -> None:
        self._overviews = deque[Overview](maxlen=_REMEMBERED)

    def actors(self, now: Overview, endings: Sequence[Ending]) -> list[Actor]:
        last: Mapping[ActorId, Ending] = {ending.actor: ending for ending in reversed(endings)}
        return [Actor(load, busy(self._overviews, load), last.get(load.actor)) for load in now.actors]

    def rates(self, now: Overview) -> Mapping[UsageKind, float]:
        return tokens_per_s(self._overviews, now)

    def add(self, now: Overview) -> None:
        self._overviews.append(now)


def by_tenant(queues: Sequence[QueueLoad]) -> list[TenantQueue]:
    """Who has most waiting comes first."""
    names = dict.fromkeys(queue.tenant for queue in queues)
    found = [_of(name, [queue for queue in queues if queue.tenant == name]) for name in names]
    return sorted(found, key=lambda queue: queue.tokens, reverse=True)


def _of(tenant: str, queues: Sequence[QueueLoad]) -> TenantQueue:
    return TenantQueue(tenant, sum(q.commands for q in queues), sum(q.tokens for q in queues), queues)


@router.get("/deployment")
async def deployment(visitor: VisitorOf) -> Response:
    overview = await ask(visitor, LookOver(), Overview)
    endings = await ask(visitor, LookAtEndings(), list[Ending])
    seen = Seen()
    return page(
        visitor,
        "deployment.html",
        overview=overview,
        actors=seen.actors(overview, endings),
        queues=by_tenant(overview.queues),
        rates=seen.rates(overview),
        endings=endings[:20],
    )


@router.post("/deployment")
async def drain(visitor: VisitorOf, form: FormOf) -> Response:
    await tell(visitor, StartDrain(ActorId(form.text("actor"))))
    return RedirectResponse(f"{PATH}/deployment", 303)
