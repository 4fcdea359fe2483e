"""Lorry's errors in Anthropic's words."""

from typing import Any

import msgspec

from ...wire.errors import LorryError
from ..chat.endpoint import Api

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(status: int, error: LorryError) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def event(data: dict[str, Any]) -> bytes:
    """Its name is its type."""
    return b"event: " + str(data["type"]).encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


API = Api(error_body, lambda status, error: event(error_body(status, error)), event({"type": "ping"}))
