"""Saving and loading: training states, weights to sample from, and weights to download."""

from typing import Annotated

from fastapi import APIRouter, Depends
from tinker.types import (
    LoadWeightsRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    UntypedAPIFuture,
)

from ...wire.client_messages import CommandArguments, CreateRun, RunCreated, Slot
from ...wire.errors import InvalidRequestError
from ...wire.types import WeightsInfo
from ..bodies import body_of
from ..broker import Broker, BrokerOf
from ..errors import NotSupportedError
from .models import check_optimizer
from .sessions import plain_strings
from .training import seq_of

router = APIRouter()


@router.post("/save_weights")
async def save_weights(
    broker: BrokerOf, body: Annotated[SaveWeightsRequest, Depends(body_of(SaveWeightsRequest))]
) -> UntypedAPIFuture:
    seq = seq_of(body.seq_id)
    arguments = CommandArguments(
        name=body.path or f"at-{seq}",
        ttl_seconds=body.ttl_seconds,
        overwrite=body.overwrite,
        user_metadata=body.user_metadata or {},
    )
    made = await broker.submit(body.model_id, seq, "save_state", "save", arguments=arguments)
    return UntypedAPIFuture(request_id=str(made), model_id=body.model_id)


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(
    broker: BrokerOf,
    body: Annotated[SaveWeightsForSamplerRequest, Depends(body_of(SaveWeightsForSamplerRequest))],
) -> UntypedAPIFuture:
    """With a name, a checkpoint; without, a sampler of the weights as they are at this point, for a day."""
    if body.kind != "snapshot":
        raise NotSupportedError(f"kind is {body.kind!r}, expected 'snapshot'", field="kind")
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise InvalidRequestError("give exactly one of path and sampling_session_seq_id", field="path")
    arguments = CommandArguments(
        name=body.path,
        ttl_seconds=body.ttl_seconds,
        sampler_slot=body.sampling_session_seq_id,
        user_metadata=body.user_metadata or {},
    )
    made = await broker.submit(
        body.model_id, seq_of(body.seq_id), "save_weights_for_sampler", "sampler", arguments=arguments
    )
    return UntypedAPIFuture(request_id=str(made), model_id=body.model_id)


@router.post("/save_weights_external")
async def save_weights_external(
    broker: BrokerOf, body: Annotated[SaveWeightsExternalRequest, Depends(body_of(SaveWeightsExternalRequest))]
) -> UntypedAPIFuture:
    if body.age_encryption_recipients:
        raise NotSupportedError("Lorry does not encrypt what it exports", field="age_encryption_recipients")
    arguments = CommandArguments(name=body.path, ttl_seconds=body.ttl_seconds, external=True)
    made = await broker.submit(
        body.model_id, seq_of(body.seq_id), "save_weights_for_sampler", "external", arguments=arguments
    )
    return UntypedAPIFuture(request_id=str(made), model_id=body.model_id)


@router.post("/load_weights")
async def load_weights(
    broker: BrokerOf, body: Annotated[LoadWeightsRequest, Depends(body_of(LoadWeightsRequest))]
) -> UntypedAPIFuture:
    """Onto a run that is there; or, with a session and a place in it, onto a new one whose first request this is."""
    if body.weights_access_token is not None:
        raise NotSupportedError("access tokens are not made here: publish the checkpoint instead", field="path")
    check_optimizer(body.optimizer_config)
    if body.session_id is not None and body.model_seq_id is not None:
        model, seq = await _make_run_for(broker, body, Slot(body.session_id, body.model_seq_id)), 0
    elif body.model_id is not None:
        model, seq = body.model_id, seq_of(body.seq_id)
    else:
        raise InvalidRequestError("give model_id and seq_id, or session_id and model_seq_id", field="model_id")
    arguments = CommandArguments(path=body.path, optimizer=body.optimizer)
    made = await broker.submit(model, seq, "load_state", "load", arguments=arguments)
    return UntypedAPIFuture(request_id=str(made), model_id=model)


async def _make_run_for(broker: Broker, body: LoadWeightsRequest, slot: Slot) -> str:
    """A run of the checkpoint's shape: its commands count from 0, which is the load."""
    source = await broker.look("weights", WeightsInfo, body.path)
    base_model, metadata = body.base_model or source.base_model, plain_strings(body.user_metadata)
    created = await broker.ask(
        lambda number: CreateRun(number, "", base_model, source.lora, metadata, slot, first_seq=0), RunCreated
    )
    return created.run
