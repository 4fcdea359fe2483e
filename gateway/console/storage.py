"""For administrators: what is kept, for whom, and how much room there is."""

from fastapi import APIRouter
from starlette.responses import Response

from ...wire.admin_messages import LookAtStorage, StorageOverview
from .orders import ask
from .rendering import page
from .visiting import VisitorOf

router = APIRouter()


@router.get("/storage")
async def storage(visitor: VisitorOf) -> Response:
    return page(visitor, "storage.html", storage=await ask(visitor, LookAtStorage(), StorageOverview))
