"""Training runs as the SDK makes and addresses them: it calls a run a model, and its id a model id."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from tinker.types import (
    AdamOptimizerConfig,
    CreateModelRequest,
    GetInfoRequest,
    GetInfoResponse,
    ModelData,
    OptimizerConfig,
    UnloadModelRequest,
    UntypedAPIFuture,
)

from ...wire.catalogue_messages import Slot
from ...wire.client_messages import CreateRun, RunCreated
from ...wire.ids import FutureId
from ...wire.types import GetInfoResponse as RunInfo
from ...wire.types import LoraConfig
from ..bodies import body_of
from ..broker import BrokerOf
from ..errors import NotSupportedError
from ..request_ids import RequestId
from .sessions import plain_strings

router = APIRouter()


def check_optimizer(optimizer: OptimizerConfig | None) -> None:
    if optimizer is not None and not isinstance(optimizer, AdamOptimizerConfig):
        raise NotSupportedError(f"the optimizer is {optimizer.type!r}, expected 'adamw'", field="optimizer_config")


@router.post("/create_model")
async def create_model(
    broker: BrokerOf, body: Annotated[CreateModelRequest, Depends(body_of(CreateModelRequest))]
) -> UntypedAPIFuture:
    """A run in its place of the session, so that a request that is sent twice makes one. Its commands count from 1."""
    check_optimizer(body.optimizer_config)
    if (lora := body.lora_config) is None:
        raise NotSupportedError("lora_config is missing: Lorry trains adapters only", field="lora_config")
    wanted = LoraConfig(
        rank=lora.rank,
        seed=lora.seed,
        train_mlp=lora.train_mlp,
        train_attn=lora.train_attn,
        train_unembed=lora.train_unembed,
    )
    slot, metadata = Slot(body.session_id, body.model_seq_id), plain_strings(body.user_metadata)
    created = await broker.ask(
        lambda number: CreateRun(number, "", body.base_model, wanted, metadata, slot, first_seq=1), RunCreated
    )
    return UntypedAPIFuture(request_id=str(RequestId("create", FutureId(created.run))), model_id=created.run)


@router.post("/get_info")
async def get_info(
    broker: BrokerOf, request: Request, body: Annotated[GetInfoRequest, Depends(body_of(GetInfoRequest))]
) -> GetInfoResponse:
    await broker.loaded(body.model_id, request.app.state.gateway.config.long_poll_s)
    info = await broker.look("run", RunInfo, body.model_id)
    return GetInfoResponse(
        type="get_info",
        model_data=ModelData(arch="lora", model_name=info.model_name, tokenizer_id=info.tokenizer_id),
        model_id=info.model_id,
        is_lora=info.is_lora,
        lora_rank=info.lora_rank,
        model_name=info.model_name,
    )


@router.post("/unload_model")
async def unload_model(
    broker: BrokerOf, request: Request, body: Annotated[UnloadModelRequest, Depends(body_of(UnloadModelRequest))]
) -> UntypedAPIFuture:
    """Nothing has to be done: a run that is not used leaves the device by itself, and can always go on."""
    await broker.loaded(body.model_id, request.app.state.gateway.config.long_poll_s)
    info = await broker.look("run", RunInfo, body.model_id)
    return UntypedAPIFuture(request_id=str(RequestId("unload", FutureId(info.model_id))), model_id=info.model_id)
