"""Lorry's errors in OpenAI's words."""

from typing import Any

import msgspec

from ...wire.errors import (
    AuthenticationError,
    LimitReachedError,
    LorryError,
    MessageTooLargeError,
    NotFoundError,
)
from ..chat.endpoint import Api

_CODES: dict[type[LorryError], str] = {
    AuthenticationError: "invalid_api_key",
    LimitReachedError: "limit_reached",
    MessageTooLargeError: "request_too_large",
    NotFoundError: "model_not_found",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, error: LorryError) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    said = {"message": str(error), "type": kind, "param": param_of(error), "code": _CODES.get(type(error))}
    return {"error": said}


def param_of(error: LorryError) -> str | None:
    """The field as OpenAI's API calls it."""
    if isinstance(error, NotFoundError):
        return "model"
    return None if error.field is None else error.field.removeprefix("sampling_params.")


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
API = Api(error_body, lambda status, error: event(error_body(status, error)), b": ping\n\n")
