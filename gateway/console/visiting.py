"""Who looks at the console. A key is shown once, at the door; from then on the browser holds a token that stands for
it, in a cookie that no script can read.

A token ends after an hour, and with its key; whoever looks at a page meanwhile gets a new one. The gateway keeps
nothing: a token opens the console at any gateway, and after a restart.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http.cookies import SimpleCookie
from typing import Annotated

from fastapi import Depends, Request
from tinker.lib._jwt_auth import jwt_claims

from ...wire.admin_messages import KeyInfo
from ...wire.catalogue_messages import MintToken
from ...wire.errors import AuthenticationError
from ...wire.limits import Scope
from ..broker import Broker, check_token
from ..errors import ForeignRequestError
from ..peers import peer_of
from .origins import is_own
from .safety import COOKIE

PATH = "/console"
_LASTS_S = 3600
_RENEWED_AFTER_S = 900


@dataclass(frozen=True, slots=True)
class Visitor:
    """What a handler gets: `broker` is its tenant's, `key` the one that it signed in with."""

    request: Request
    broker: Broker
    key: KeyInfo

    def may(self, scope: Scope) -> bool:
        return scope in self.key.scopes


@asynccontextmanager
async def broker_for(request: Request, key: str) -> AsyncGenerator[Broker]:
    """Raises AuthenticationError, TooManyTriesError and what `Connections.use` does."""
    check_token(key)
    gateway = request.app.state.gateway
    peer = peer_of(request.client.host) if request.client else ""
    async with gateway.connections.use(key, peer) as connection:
        yield Broker(connection, gateway.config.answer_within_s, None, partial(gateway.connections.use, peer=peer))


def check_own(request: Request) -> None:
    """Raises ForeignRequestError."""
    if not is_own(request.headers):
        raise ForeignRequestError("this was not sent by a page of the console, so nothing was changed")


async def sign_in(request: Request, key: str) -> None:
    """The answer sets the cookie: a new token, whatever the browser had before. Raises as `broker_for` does."""
    if not key:
        raise AuthenticationError("a key is missing", field="api_key")
    async with broker_for(request, key) as broker:
        _let_have(request, await broker.ask(MintToken, str))


def sign_out(request: Request) -> None:
    _let_have(request, "", lasts_s=0)


@asynccontextmanager
async def visiting(request: Request) -> AsyncGenerator[Visitor]:
    """Raises AuthenticationError, ForeignRequestError and what `Connections.use` does."""
    token = _token(request)
    if not token.startswith("eyJ"):
        raise AuthenticationError("nobody is signed in", field="api_key")
    if request.method != "GET":
        check_own(request)
    async with broker_for(request, token) as broker:
        if time.time() - float(jwt_claims(token)["iat"]) > _RENEWED_AFTER_S:
            _let_have(request, await broker.ask(MintToken, str))
        request.state.visitor = visitor = Visitor(request, broker, await broker.look("key", KeyInfo))
        yield visitor


async def _visitor(request: Request) -> AsyncGenerator[Visitor]:
    async with visiting(request) as visitor:
        yield visitor


VisitorOf = Annotated[Visitor, Depends(_visitor)]


def _let_have(request: Request, token: str, lasts_s: int = _LASTS_S) -> None:
    cookie = SimpleCookie()
    cookie[_name(request)] = token
    morsel = cookie[_name(request)]
    morsel["path"] = "/" if _is_secure(request) else PATH
    morsel["max-age"] = lasts_s
    morsel["httponly"], morsel["samesite"] = True, "Lax"
    if _is_secure(request):
        morsel["secure"] = True
    request.scope[COOKIE] = morsel.OutputString()


def _token(request: Request) -> str:
    return request.cookies.get(_name(request), "")


def _name(request: Request) -> str:
    """With this prefix a browser takes it from this very host alone, and over TLS."""
    return "__Host-lorry_console" if _is_secure(request) else "lorry_console"


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"
