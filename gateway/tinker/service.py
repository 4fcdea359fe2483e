"""What a client asks before it works: is the server there, what does it serve, which features should be used."""

from typing import Annotated

from fastapi import APIRouter, Depends
from tinker.types import (
    ClientConfigRequest,
    ClientConfigResponse,
    ClientDynamicConfigResponse,
    GetServerCapabilitiesResponse,
    SupportedModel,
    TelemetryResponse,
    TelemetrySendRequest,
)

from ...wire.catalogue_messages import CountClientEvents
from ...wire.types import GetServerCapabilitiesResponse as Capabilities
from ..bodies import body_of
from ..broker import BrokerOf

router = APIRouter()

CONFIG = ClientConfigResponse(
    parallel_fwdbwd_chunks=True,
    proto_compress_fwdbwd=True,
    sample_use_retrieve_futures=True,
    sample_join_sampling_session=True,
    custom_loss_server_side=True,
    pjwt_auth_enabled=True,
)
"""Chunks go out together: the broker orders them by seq. `whoami` needs a JWT."""
_FAILURES = frozenset(("ERROR", "CRITICAL"))
DYNAMIC_CONFIG = ClientDynamicConfigResponse(sample_cancel_enabled=True)


@router.post("/client/config")
async def client_config(
    body: Annotated[ClientConfigRequest, Depends(body_of(ClientConfigRequest))],
) -> ClientConfigResponse:
    return CONFIG


@router.post("/client/dynamic_config")
async def client_dynamic_config(
    body: Annotated[ClientConfigRequest, Depends(body_of(ClientConfigRequest))],
) -> ClientDynamicConfigResponse:
    return DYNAMIC_CONFIG


@router.get("/get_server_capabilities")
async def get_server_capabilities(broker: BrokerOf) -> GetServerCapabilitiesResponse:
    known = await broker.look("capabilities", Capabilities)
    return GetServerCapabilitiesResponse(
        supported_models=[
            SupportedModel(
                model_name=model.model_name,
                max_context_length=model.max_context_length,
                trainable=model.trainable,
                sampleable=model.sampleable,
            )
            for model in known.supported_models
        ]
    )


@router.post("/telemetry")
async def telemetry(
    broker: BrokerOf, body: Annotated[TelemetrySendRequest, Depends(body_of(TelemetrySendRequest))]
) -> TelemetryResponse:
    """Counted, for `lorry status`; what the events say is not kept."""
    events, failures = len(body.events), sum(event.severity in _FAILURES for event in body.events)
    await broker.tell(lambda number: CountClientEvents(number, events, failures))
    return TelemetryResponse(status="accepted")
