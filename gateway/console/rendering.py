"""Pages made of templates. Whatever is put into one is text: Jinja escapes it."""

import hashlib
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any, cast
from urllib.parse import quote

from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from ...wire.words import lasting, size
from ..tinker.moments import moment
from .visiting import PATH, Visitor

STATIC = files("lorry.gateway.console") / "static"


def page(visitor: Visitor, template: str, status: int = 200, **of: Any) -> HTMLResponse:
    """`of` is what the template names, beside who visits."""
    return _page(visitor.request, template, status, {"visitor": visitor} | of)


def page_for_nobody(request: Request, template: str, status: int = 200, **of: Any) -> HTMLResponse:
    """Or for whom it is not known any more."""
    return _page(request, template, status, {"visitor": getattr(request.state, "visitor", None)} | of)


def fragment(template: str, **of: Any) -> str:
    """A part of a page, made anew."""
    return _templates().get_template(template).render(of)


def _page(request: Request, template: str, status: int, of: Mapping[str, Any]) -> HTMLResponse:
    told: Mapping[str, Any] = {"here": request.url.path, "now": time.time(), **of}
    return HTMLResponse(_templates().get_template(template).render(told), status)


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("lorry.gateway.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "size": size,
        "lasting": lasting,
        "ago": ago,
        "moment": when,
        "number": number,
        "segment": lambda text: quote(str(text), safe=":"),
    }
    names: dict[str, Any] = {"console": PATH, "static": static}
    cast("dict[str, Any]", made.globals).update(names)
    return made


def ago(at: float) -> Markup:
    text = f"{lasting(time.time() - at)} ago"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment(at).isoformat(), _utc(at), text)


def when(at: float | None) -> Markup:
    if at is None:
        return Markup("never")
    return Markup('<time datetime="{}">{}</time>').format(moment(at).isoformat(), _utc(at))


def _utc(at: float) -> str:
    return moment(at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: float | None) -> str:
    """With as many digits as one reads."""
    if value is None:
        return "–"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


@cache
def static(name: str) -> str:
    """Where a file of the console's own lies, under a name that changes with it."""
    return f"{PATH}/static/{name}?{digest(name)}"


@cache
def digest(name: str) -> str:
    """Of a file that is there."""
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]


def today() -> datetime:
    return datetime.now(UTC)
