"""What a request's route is called, wherever it lies: its template, as /api/v1/sessions/{session_id}."""

from collections.abc import Iterable

from fastapi import APIRouter
from starlette.routing import Route
from starlette.types import Scope

API = "/api/v1"
_NONE = "unknown"


class Templates:
    """Of an application with these routers below `API`."""

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        paths = (route.path for router in routers for route in router.routes if isinstance(route, Route))
        # FastAPI does not say in the scope which of Starlette's own routes it took. None of ours has a field.
        self._plain = {API + path for path in paths if "{" not in path}

    def of(self, scope: Scope) -> str:
        """After the request was routed; "unknown" for a path that no route takes."""
        if scope["path"] in self._plain:
            return scope["path"]
        path: str | None = getattr(scope.get("route"), "path", None)
        if path is None:
            return _NONE
        # Whether an included router's route has its prefix in its path depends on FastAPI's version.
        lacks_prefix = scope["path"].startswith(f"{API}/") and not path.startswith(f"{API}/")
        return scope.get("root_path", "") + (API if lacks_prefix else "") + path
