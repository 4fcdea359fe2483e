"""What the SDK can ask for and Lorry does not do: each says so, with a 4xx that the SDK does not retry."""

from fastapi import APIRouter

from ..broker import BrokerOf
from ..errors import NotSupportedError

router = APIRouter()


@router.get("/sessions/{session_id}/trace_export")
async def export_session_trace(broker: BrokerOf, session_id: str) -> None:
    raise NotSupportedError("Lorry keeps no session traces")
