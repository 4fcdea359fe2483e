"""Coming in and going out."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from ...wire.errors import AuthenticationError, LorryError
from ..errors import headers_of, status_of
from .forms import FormOf
from .rendering import page_for_nobody
from .visiting import PATH, check_own, sign_in, sign_out

router = APIRouter()


@router.get("/sign-in")
async def ask_for_key(request: Request, to: Annotated[str, Query()] = "") -> Response:
    return page_for_nobody(request, "sign_in.html", to=_inside(to), problem=None)


@router.post("/sign-in")
async def let_in(request: Request, form: FormOf) -> Response:
    """Nobody is signed in by another site, as whoever: its forms are not read."""
    to = _inside(form.text("to"))
    try:
        await sign_in(request, form.text("api_key").strip())
    except LorryError as error:
        problem = "This key opens nothing." if isinstance(error, AuthenticationError) else str(error)
        told = page_for_nobody(request, "sign_in.html", status_of(error), to=to, problem=problem)
        told.headers.update(headers_of(error))
        return told
    return RedirectResponse(to, 303)


@router.post("/sign-out")
async def let_out(request: Request) -> Response:
    check_own(request)
    sign_out(request)
    return RedirectResponse(f"{PATH}/sign-in", 303)


def _inside(to: str) -> str:
    """A page of the console, whatever a link says."""
    is_inside = to == PATH or to.startswith(f"{PATH}/")
    return to if is_inside and "\\" not in to and to.isprintable() else PATH
