"""Saving and loading: training states, weights to sample from, and weights to download."""

from fastapi import APIRouter
from tinker.types import (
    LoadWeightsRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)

from ...wire.catalogue_messages import Slot
from ...wire.client_messages import CommandArguments, CreateRun, RunCreated
from ...wire.errors import InvalidRequestError
from ...wire.types import WeightsInfo
from ..broker import Broker
from ..errors import NotSupportedError
from .models import check_optimizer
from .ordered import Wanted, json_command, seq_of
from .sessions import plain_strings

router = APIRouter()


async def _save(broker: Broker, body: SaveWeightsRequest) -> Wanted:
    seq = seq_of(body.seq_id)
    arguments = CommandArguments(
        name=f"at-{seq}" if body.path is None else body.path,
        ttl_seconds=body.ttl_seconds,
        overwrite=body.overwrite,
        user_metadata=body.user_metadata or {},
    )
    return Wanted(body.model_id, seq, arguments=arguments)


async def _save_for_sampler(broker: Broker, body: SaveWeightsForSamplerRequest) -> Wanted:
    """With a name, a checkpoint; without, a sampler of the weights as they are at this point, for a day; in flight, it
    has the next ones that are saved so, too."""
    if (body.path is None) == (body.sampling_session_seq_id is None):
        raise InvalidRequestError("give exactly one of path and sampling_session_seq_id", field="path")
    if body.kind == "inflight" and body.path is not None:
        raise InvalidRequestError.of("kind", body.kind, "'snapshot' where weights get a name")
    arguments = CommandArguments(
        name=body.path,
        ttl_seconds=body.ttl_seconds,
        sampler_slot=body.sampling_session_seq_id,
        in_flight=body.kind == "inflight",
        user_metadata=body.user_metadata or {},
    )
    return Wanted(body.model_id, seq_of(body.seq_id), arguments=arguments)


async def _save_external(broker: Broker, body: SaveWeightsExternalRequest) -> Wanted:
    if body.age_encryption_recipients:
        raise NotSupportedError("Lorry does not encrypt what it exports", field="age_encryption_recipients")
    arguments = CommandArguments(name=body.path, ttl_seconds=body.ttl_seconds, external=True)
    return Wanted(body.model_id, seq_of(body.seq_id), arguments=arguments)


async def _load(broker: Broker, body: LoadWeightsRequest) -> Wanted:
    """Onto a run that is there; or, with a session and a place in it, onto a new one whose first request this is."""
    if body.weights_access_token is not None:
        await broker.borrow(body.path, body.weights_access_token)
    check_optimizer(body.optimizer_config)
    arguments = CommandArguments(path=body.path, optimizer=body.optimizer)
    if body.session_id is not None and body.model_seq_id is not None:
        run = await _make_run_for(broker, body, Slot(body.session_id, body.model_seq_id))
        return Wanted(run, 0, arguments=arguments)
    if body.model_id is None:
        raise InvalidRequestError("give model_id and seq_id, or session_id and model_seq_id", field="model_id")
    return Wanted(body.model_id, seq_of(body.seq_id), arguments=arguments)


async def _make_run_for(broker: Broker, body: LoadWeightsRequest, slot: Slot) -> str:
    """A run of the checkpoint's shape: its commands count from 0, which is the load."""
    source = await broker.look("weights", WeightsInfo, body.path)
    base_model, metadata = body.base_model or source.base_model, plain_strings(body.user_metadata)
    created = await broker.ask(
        lambda number: CreateRun(number, "", base_model, source.lora, metadata, slot, first_seq=0), RunCreated
    )
    return created.run


for path, handle in {
    "/save_weights": json_command(SaveWeightsRequest, "save_state", "save", _save),
    "/save_weights_for_sampler": json_command(
        SaveWeightsForSamplerRequest, "save_weights_for_sampler", "sampler", _save_for_sampler
    ),
    "/save_weights_external": json_command(
        SaveWeightsExternalRequest, "save_weights_for_sampler", "external", _save_external
    ),
    "/load_weights": json_command(LoadWeightsRequest, "load_state", "load", _load),
}.items():
    router.add_route(path, handle, ["POST"])
