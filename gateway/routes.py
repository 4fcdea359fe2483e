"""What a request's route is called, wherever it lies: its template, as /api/v1/sessions/{session_id}."""

from collections.abc import Iterable, Mapping

from fastapi import APIRouter
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

API = "/api/v1"
_NONE = "unknown"
_ANYTHING = "/{rest:path}"


class Templates:
    """Of an application with these routers below `API`, and routes that are mounted at other places."""

    def __init__(self, routers: Iterable[APIRouter], mounted: Mapping[str, Iterable[BaseRoute]]) -> None:
        paths = (route.path for router in routers for route in router.routes if isinstance(route, Route))
        # FastAPI does not say in the scope which of Starlette's own routes it took. None of ours has a field.
        self._plain = {API + path for path in paths if "{" not in path}
        self._mounted = {
            prefix: [route for route in routes if isinstance(route, Route)] for prefix, routes in mounted.items()
        }

    def of(self, scope: Scope) -> str:
        """After the request was routed; "unknown" for a path that no route takes."""
        if scope["path"] in self._plain:
            return scope["path"]
        for prefix, routes in self._mounted.items():
            if scope["path"].startswith(f"{prefix}/"):
                return _among(routes, prefix, scope["path"].removeprefix(prefix))
        path: str | None = getattr(scope.get("route"), "path", None)
        if path is None:
            return _NONE
        # Whether an included router's route has its prefix in its path depends on FastAPI's version.
        lacks_prefix = scope["path"].startswith(f"{API}/") and not path.startswith(f"{API}/")
        return scope.get("root_path", "") + (API if lacks_prefix else "") + path


def _among(routes: Iterable[Route], prefix: str, path: str) -> str:
    """The first that takes it, which is who answers; one that takes anything is for what is not there."""
    taken = next((route.path for route in routes if route.path_regex.match(path)), _ANYTHING)
    return _NONE if taken == _ANYTHING else prefix + taken
