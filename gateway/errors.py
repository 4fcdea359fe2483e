"""Lorry's errors as HTTP answers, and as the failures of futures. The SDK makes its exceptions of the status codes."""

import math

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from tinker.types import RequestErrorCategory, RequestFailedResponse

from ..wire.errors import (
    AuthenticationError,
    ConnectionLostError,
    LimitReachedError,
    LorryError,
    MessageTooLargeError,
    NotFoundError,
    PermissionDeniedError,
    SessionFinishedError,
    StorageUnavailableError,
    TooManyTriesError,
    TooManyWaitingError,
)

log = structlog.get_logger("lorry.gateway")


class OverloadedError(LorryError):
    """Send it again in a moment."""


class LoadingError(LorryError):
    """Ask again in a moment."""


class NotSupportedError(LorryError):
    """docs/compatibility.md lists what Lorry does."""

    category = "user"


class MalformedBodyError(LorryError):
    """The body is not what this endpoint takes."""

    category = "user"


class ForeignRequestError(LorryError):
    """Open the console by its own address, and do it there."""

    category = "user"


class NoRouteError(LorryError):
    """docs/endpoints.md lists what there is."""

    category = "user"


class MethodError(LorryError):
    """docs/endpoints.md lists what there is."""

    category = "user"


class TokenizerMissingError(LorryError):
    """Whoever runs this server lets the gateway read the model's folder, under the path by which its actors know it; a
    tokenizer that needs code of its own is not loaded."""


_STATUS: dict[type[LorryError], int] = {
    AuthenticationError: 401,
    PermissionDeniedError: 403,
    LimitReachedError: 403,
    ForeignRequestError: 403,
    NotFoundError: 404,
    SessionFinishedError: 410,
    NoRouteError: 404,
    MethodError: 405,
    MessageTooLargeError: 413,
    MalformedBodyError: 422,
    OverloadedError: 429,
    TooManyTriesError: 429,
    TooManyWaitingError: 429,
    NotSupportedError: 400,
    ConnectionLostError: 503,
    LoadingError: 503,
    StorageUnavailableError: 503,
}


_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": 'Bearer error="invalid_token"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


def status_of(error: LorryError) -> int:
    """4xx for what the caller can mend, 5xx for what it cannot. The SDK sends again what is answered with 408, 409,
    429 or 5xx: so none of these says that a request is wrong."""
    return _STATUS.get(type(error), 400 if error.category == "user" else 500)


def failed(error: LorryError) -> JSONResponse:
    """The answer to a future that failed: the SDK raises RequestFailedError."""
    category = RequestErrorCategory.User if error.category == "user" else RequestErrorCategory.Server
    return JSONResponse(RequestFailedResponse(error=str(error), category=category).model_dump(mode="json"))


def headers_of(error: LorryError) -> dict[str, str]:
    headers = _HEADERS.get(status_of(error), {})
    if error.after_s is not None:
        headers = headers | {"Retry-After": str(math.ceil(error.after_s))}
    return headers


def _answer(error: LorryError) -> JSONResponse:
    body = {"detail": str(error), "field": error.field, "category": error.category}
    return JSONResponse(body, status_of(error), headers_of(error) or None)


def install(app: FastAPI) -> None:
    """Every LorryError and time-out of a handler becomes an answer; anything else is a bug, is logged, and is a 500."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, LorryError)
        return _answer(error)

    async def late(request: Request, error: Exception) -> JSONResponse:
        return _answer(ConnectionLostError("the broker did not answer in time"))

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        log.error("bug", path=request.url.path, error=repr(error))
        return JSONResponse({"detail": "This is a bug in Lorry; the server's log has the details."}, 500)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(LorryError, known)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(TimeoutError, late)
    app.add_exception_handler(Exception, unknown)
