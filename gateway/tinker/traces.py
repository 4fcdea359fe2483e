"""A client session's timeline as a Perfetto file: made when it is asked for, and taken away by a signed link."""

import time
from pathlib import Path
from typing import IO

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...client.session_trace import SUFFIX, SessionTrace
from ...wire.catalogue_messages import SessionTimeline
from ...wire.timelines import Place, Timeline
from ..broker import Broker, BrokerOf
from .downloads import link_to_trace, traces_folder

router = APIRouter()


@router.get("/sessions/{session_id}/trace_export")
async def export_session_trace(broker: BrokerOf, request: Request, session_id: str) -> Response:
    """The SDK asks until it is ready, which it is when this answers."""
    first = await _page(broker, session_id, None)
    folder, kept_s = traces_folder(request), request.app.state.gateway.config.link_ttl_s
    async with request.app.state.gateway.exports:
        await to_thread.run_sync(_clear, folder, time.time() - kept_s)
        await _write(broker, folder, session_id, first)
    return JSONResponse({"status": "ready", "url": link_to_trace(request, session_id + SUFFIX)})


async def _page(broker: Broker, session: str, after: Place | None) -> Timeline:
    """Raises NotFoundError for a session that is not the tenant's."""
    return await broker.ask(lambda number: SessionTimeline(number, session, after), Timeline)


async def _write(broker: Broker, folder: Path, session: str, page: Timeline) -> None:
    """Under its name when it is whole; whoever reads the one from before reads that to its end."""
    aside = folder / f"{session}.{time.time_ns()}"
    file = await to_thread.run_sync(_opened, aside)
    try:
        trace = await to_thread.run_sync(SessionTrace, file, f"session {session}")
        await to_thread.run_sync(trace.add, page.commands)
        while page.after is not None:
            page = await _page(broker, session, page.after)
            await to_thread.run_sync(trace.add, page.commands)
        await to_thread.run_sync(_named, file, aside, folder / (session + SUFFIX))
    finally:
        file.close()
        aside.unlink(missing_ok=True)


def _opened(file: Path) -> IO[bytes]:
    return file.open("wb")


def _named(file: IO[bytes], aside: Path, name: Path) -> None:
    file.close()
    aside.replace(name)


def _clear(folder: Path, before: float) -> None:
    """Those that no link leads to any more."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for file in folder.iterdir():
        if file.stat().st_mtime < before:
            file.unlink(missing_ok=True)
