"""Whether the gateway is alive, which it is when it answers, and whether what it leads to is ready. Needs no key."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..client.probe import probe
from ..wire.errors import ConnectionLostError
from .config import GatewayConfig

router = APIRouter()

_PATIENCE_S = 5.0


@router.get("/healthz")
async def healthz(request: Request) -> Response:
    """200 while the gateway lives, whatever is behind it."""
    return JSONResponse(await _health(request))


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 once every model can be used or has failed to load, and one can be used; 503 until then."""
    health = await _health(request)
    return JSONResponse(health, 200 if health["ready"] else 503, None if health["ready"] else {"Retry-After": "1"})


async def _health(request: Request) -> dict[str, object]:
    config: GatewayConfig = request.app.state.gateway.config
    try:
        found = await probe(config.connect, config.server_key, _PATIENCE_S)
    except ConnectionLostError as error:
        return {"status": "ok", "ready": False, "reason": str(error)}
    models = {"ready": found.ready, "loading": found.loading, "failed": found.failed}
    return {"status": "ok", "ready": bool(found.ready) and not found.loading, "models": models}
