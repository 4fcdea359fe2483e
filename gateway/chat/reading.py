"""A JSON body as one of an API's requests, strictly: what is not known is refused by its name, and its value shown."""

import re
from typing import Any, TypeVar

import msgspec

from ...wire.errors import InvalidRequestError

T = TypeVar("T")

_AT = re.compile(r"(?P<problem>.*?)(?: - at `(?:key in )?\$(?P<path>.*?)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
_SHOWN = 80


def read(body: bytes, kind: type[T], refused: dict[str, str] | None = None) -> T:
    """`refused` says why there is no such field, by its name. Raises InvalidRequestError naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _told(str(error), body, refused or {}) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not JSON ({error})", field="body") from None


def _told(said: str, body: bytes, refused: dict[str, str]) -> InvalidRequestError:
    match = _AT.fullmatch(said)
    problem, path = (match["problem"], (match["path"] or "").lstrip(".")) if match else (said, "")
    if unknown := _UNKNOWN.fullmatch(problem):
        field = _joined(path, unknown[1])
        why = refused.get(unknown[1], "is not known here")
        return InvalidRequestError(f"{field} {why}; leave it out", field=field)
    if missing := _MISSING.fullmatch(problem):
        field = _joined(path, missing[1])
        return InvalidRequestError(f"{field} is missing", field=field)
    shown = _shown(body, path)
    return InvalidRequestError(f"{path or 'body'}{shown}: {problem}", field=path or "body")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(body: bytes, path: str) -> str:
    """The value there, as far as it is short."""
    try:
        value: Any = msgspec.json.decode(body)
        for name, number in _STEP.findall(path):
            value = value[int(number)] if number else value[name]
    except (LookupError, TypeError, RecursionError, UnicodeError, msgspec.DecodeError):
        return ""
    shown = repr(value)
    return f" is {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + '...'}"
