"""What a form sends: fields by name. Forms are small, and read only where a page of the console sent them: what nobody
has shown a key for costs no more than that."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends, Request

from ...wire.errors import InvalidRequestError, MessageTooLargeError
from ..errors import MalformedBodyError
from .visiting import check_own

N = TypeVar("N", int, float)

_BYTES_AT_MOST = 1 << 20
_FIELDS_AT_MOST = 5_000


@dataclass(frozen=True, slots=True)
class Form:
    fields: Mapping[str, list[str]]

    def text(self, name: str, default: str = "") -> str:
        """Lines end as they do everywhere but in a form."""
        return self.fields.get(name, [default])[-1].replace("\r\n", "\n")

    def texts(self, name: str) -> list[str]:
        return list(self.fields.get(name, []))

    def number(self, name: str, kind: type[N]) -> N | None:
        """None where the field was left empty. Raises InvalidRequestError."""
        said = self.text(name).strip()
        if not said:
            return None
        with suppress(ValueError):
            if isfinite(value := kind(said)):
                return value
        raise InvalidRequestError.of(name, said, "a whole number" if kind is int else "a number")


async def _form(request: Request) -> Form:
    """Raises ForeignRequestError, MessageTooLargeError, MalformedBodyError."""
    check_own(request)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _BYTES_AT_MOST:
            raise MessageTooLargeError(f"the form has more than {_BYTES_AT_MOST:,} bytes, which is the limit")
    fields: dict[str, list[str]] = {}
    try:
        for name, value in parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=_FIELDS_AT_MOST, errors="strict"
        ):
            fields.setdefault(name, []).append(value)
    except ValueError as error:
        raise MalformedBodyError(f"the form cannot be read ({error})") from None
    return Form(fields)


FormOf = Annotated[Form, Depends(_form)]
