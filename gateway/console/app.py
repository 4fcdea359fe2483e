"""The console put together: its pages, its files, and what a page says of what went wrong."""

from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from ...wire.errors import AuthenticationError, ConnectionLostError, LorryError
from ..errors import headers_of, status_of
from . import audit, checkpoints, curves, deployment, door, live, playground, runs, storage, tenants, usage, waiting
from .rendering import digest, page_for_nobody
from .safety import Safe
from .visiting import PATH

log = structlog.get_logger("lorry.gateway")

ROUTERS = (door, runs, curves, waiting, checkpoints, usage, playground, audit, deployment, tenants, storage)
ROUTES = [route for module in ROUTERS for route in module.router.routes] + [live.ROUTE]


class _Files(StaticFiles):
    """A browser asks once for what is asked for under a name that changes with it, and for the rest whether it is
    still the same."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        answer = await super().get_response(path, scope)
        is_digest = answer.status_code == 200 and scope["query_string"].decode() == digest(path)
        answer.headers["cache-control"] = "public, max-age=31536000, immutable" if is_digest else "no-cache"
        return answer


def app(gateway: object) -> ASGIApp:
    built = FastAPI(title="Lorry console", docs_url=None, redoc_url=None, openapi_url=None)
    built.state.gateway = gateway
    for module in ROUTERS:
        built.include_router(module.router)
    built.router.routes.append(live.ROUTE)
    built.mount("/static", _Files(directory=Path(__file__).parent / "static"))
    _install(built)
    return Safe(built)


def _install(built: FastAPI) -> None:
    """What went wrong is a page; who is not signed in gets to the door."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, LorryError)
        if isinstance(error, AuthenticationError) and request.method == "GET" and _wants_page(request):
            query = f"?{request.url.query}" if request.url.query else ""
            return RedirectResponse(f"{PATH}/sign-in?to={quote(request.url.path + query)}", 303)
        return _told(request, status_of(error), str(error), headers_of(error))

    async def late(request: Request, error: Exception) -> Response:
        return await known(request, ConnectionLostError("the broker did not answer in time"))

    async def not_there(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _told(request, error.status_code, f"{HTTPStatus(error.status_code).phrase}: {request.url.path}")

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _told(request, 422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    async def unknown(request: Request, error: Exception) -> Response:
        log.error("bug", path=request.url.path, error=repr(error))
        return _told(request, 500, "This is a bug in Lorry; the server's log has the details.")

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    built.add_exception_handler(LorryError, known)
    built.add_exception_handler(TimeoutError, late)
    built.add_exception_handler(HTTPException, not_there)
    built.add_exception_handler(RequestValidationError, malformed)
    built.add_exception_handler(ClientDisconnect, gone)
    built.add_exception_handler(Exception, unknown)


def _told(request: Request, status: int, problem: str, headers: dict[str, str] | None = None) -> Response:
    if not _wants_page(request):
        return Response(problem, status, headers, media_type="text/plain")
    told = page_for_nobody(request, "problem.html", status, phrase=HTTPStatus(status).phrase, problem=problem)
    told.headers.update(headers or {})
    return told


def _wants_page(request: Request) -> bool:
    """What a script of a page asks for is no page."""
    return request.headers.get("accept") not in ("application/json", "text/event-stream")
