"""A tenant's checkpoints: listed, with which run came from which; published, kept for a while, deleted, downloaded."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from starlette.responses import RedirectResponse, Response

from ...wire.catalogue_messages import DeleteCheckpoint, ExpireCheckpoint, PublishCheckpoint
from ...wire.errors import InvalidRequestError, NotFoundError
from ...wire.lineage import Descent
from ...wire.types import Checkpoint
from ..broker import Broker
from ..tinker.downloads import archive_link
from .forms import FormOf
from .lineage import lines
from .rendering import page
from .visiting import PATH, VisitorOf

router = APIRouter()

_SHOWN_AT_MOST = 200
_HOUR_S = 3600
Change = Callable[[str], Callable[[int], Any]]
_SAYINGS = {
    "delete": "deleted",
    "publish": "published: whoever knows the path can read it",
    "hide": "no longer published",
    "expire": "given another time to live",
}


async def checkpoints_of(broker: Broker, run: str | None = None) -> list[Checkpoint]:
    """The newest first."""
    return sorted(await broker.look("checkpoints", list[Checkpoint], run), key=lambda c: c.time, reverse=True)


@router.get("/checkpoints")
async def checkpoints(
    visitor: VisitorOf,
    q: Annotated[str, Query()] = "",
    kind: Annotated[str, Query()] = "",
    did: Annotated[str, Query()] = "",
    n: Annotated[int, Query(ge=0)] = 0,
    gone: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    found = [c for c in await checkpoints_of(visitor.broker) if is_meant(c, q, kind)]
    return page(
        visitor,
        "checkpoints.html",
        q=q,
        kind=kind,
        shown=found[:_SHOWN_AT_MOST],
        total=len(found),
        size=sum(c.size_bytes for c in found),
        did=_SAYINGS.get(did),
        n=n,
        gone=gone,
        lineage=lines(await visitor.broker.look("lineage", list[Descent])),
    )


def is_meant(checkpoint: Checkpoint, text: str, kind: str) -> bool:
    """Every word of `text` is in its path, project or metadata."""
    said = (f"{key}={value}" for key, value in (checkpoint.user_metadata or {}).items())
    words = "\n".join((checkpoint.tinker_path, checkpoint.project, *said)).casefold()
    return kind in ("", checkpoint.checkpoint_type) and all(word in words for word in text.casefold().split())


@router.post("/checkpoints")
async def change(visitor: VisitorOf, form: FormOf) -> Response:
    """All that were ticked, one after the other. One that is gone meanwhile is no reason to leave the others."""
    what, paths = form.text("what"), form.texts("path")
    done, gone = await _each(paths, _change(what, form.number("hours", float)), visitor.broker.tell)
    told = {"did": what, "n": done, "gone": gone, "q": form.text("q"), "kind": form.text("kind")}
    return RedirectResponse(f"{PATH}/checkpoints?{urlencode(told)}", 303)


def _change(what: str, hours: float | None) -> Change:
    """Raises InvalidRequestError."""
    match what:
        case "delete":
            return lambda path: lambda number: DeleteCheckpoint(number, path)
        case "publish" | "hide":
            return lambda path: lambda number: PublishCheckpoint(number, path, what == "publish")
        case "expire":
            ttl = None if hours is None else max(1, round(hours * _HOUR_S))
            return lambda path: lambda number: ExpireCheckpoint(number, path, ttl)
        case _:
            raise InvalidRequestError.of("what", what, f"one of {', '.join(_SAYINGS)}")


async def _each(
    paths: Sequence[str], change: Change, tell: Callable[[Callable[[int], Any]], Awaitable[None]]
) -> tuple[int, int]:
    done = 0
    for path in paths:
        try:
            await tell(change(path))
            done += 1
        except NotFoundError:
            continue
    return done, len(paths) - done


@router.get("/download")
async def download(visitor: VisitorOf, path: Annotated[str, Query()]) -> Response:
    """A tar archive, behind a link that expires."""
    link, _ = await archive_link(visitor.broker, visitor.request, path)
    return RedirectResponse(link, 303)
