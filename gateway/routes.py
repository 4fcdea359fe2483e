"""What a request's route is called, wherever it lies: its template, as /api/v1/sessions/{session_id}."""

from starlette.types import Scope

API = "/api/v1"
_NONE = "unknown"


def template_of(scope: Scope) -> str:
    """After the request was routed; "unknown" for a path that no route takes."""
    path: str | None = getattr(scope.get("route"), "path", None)
    if path is None:
        return _NONE
    # Whether an included router's route has its prefix in its path depends on FastAPI's version.
    lacks_prefix = scope["path"].startswith(f"{API}/") and not path.startswith(f"{API}/")
    return scope.get("root_path", "") + (API if lacks_prefix else "") + path
