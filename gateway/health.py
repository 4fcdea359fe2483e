"""Whether the gateway is alive, which it is when it answers, and whether what it leads to is ready. Needs no key."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..client.probe import probe
from ..wire.errors import ConnectionLostError
from .config import GatewayConfig

router = APIRouter()

_PATIENCE_S = 5.0
_LATER = {"Retry-After": "1"}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whatever is behind the gateway, and at once."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 once every model has an actor or has failed to load, and one can be used; 503 until then, with the reason."""
    config: GatewayConfig = request.app.state.gateway.config
    try:
        found = await probe(config.connect, config.server_key, _PATIENCE_S)
    except ConnectionLostError as error:
        return JSONResponse({"ready": False, "reason": str(error)}, 503, _LATER)
    ready = found.ready > 0 and found.loading == 0
    models = {"ready": found.ready, "loading": found.loading, "failed": found.failed}
    return JSONResponse({"ready": ready, "models": models}, 200 if ready else 503, None if ready else _LATER)
