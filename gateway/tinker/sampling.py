"""Samplers and samples."""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request
from tinker.types import (
    CreateSamplingSessionRequest,
    CreateSamplingSessionResponse,
    EncodedTextChunk,
    GetSamplerResponse,
    ImageChunk,
    JoinSamplingSessionRequest,
    JoinSamplingSessionResponse,
    SampleRequest,
    UntypedAPIFuture,
)
from tinker.types import ModelInput as SdkModelInput
from tinker.types import SamplingParams as SdkSamplingParams

from ...wire import model_input
from ...wire import types as lorry
from ...wire.catalogue_messages import JoinSampler, SamplerInfo, SamplerJoined, Slot
from ...wire.client_messages import CreateSampler, SamplerCreated
from ...wire.codec import encode
from ...wire.commands import SampleInput, check_sample, planned_tokens
from ...wire.errors import InvalidRequestError
from ...wire.prefixes import prefix_marks
from ..bodies import body_of
from ..broker import BrokerOf
from ..errors import NotSupportedError
from .ordered import seq_of
from .tensors import check_shape, fill, unfold

router = APIRouter()

_SEEDS = 2**63 - 1


@router.post("/create_sampling_session")
async def create_sampling_session(
    broker: BrokerOf,
    body: Annotated[CreateSamplingSessionRequest, Depends(body_of(CreateSamplingSessionRequest))],
) -> CreateSamplingSessionResponse:
    slot = Slot(body.session_id, body.sampling_session_seq_id)
    base_model = None if body.model_path is not None else body.base_model
    created = await broker.ask(
        lambda number: CreateSampler(number, "", base_model, body.model_path, slot), SamplerCreated
    )
    return CreateSamplingSessionResponse(sampling_session_id=created.sampler)


@router.post("/join_sampling_session")
async def join_sampling_session(
    broker: BrokerOf, body: Annotated[JoinSamplingSessionRequest, Depends(body_of(JoinSamplingSessionRequest))]
) -> JoinSamplingSessionResponse:
    joined = await broker.ask(lambda number: JoinSampler(number, body.sampling_session_id), SamplerJoined)
    return JoinSamplingSessionResponse(client_counter=joined.client)


@router.get("/samplers/{sampler_id}")
async def get_sampler(broker: BrokerOf, request: Request, sampler_id: str) -> GetSamplerResponse:
    await broker.loaded(sampler_id, request.app.state.gateway.config.long_poll_s)
    info = await broker.look("sampler", SamplerInfo, sampler_id)
    return GetSamplerResponse(sampler_id=info.sampler, base_model=info.base_model, model_path=info.model_path)


@router.post("/asample")
async def asample(
    broker: BrokerOf, body: Annotated[SampleRequest, Depends(body_of(SampleRequest))]
) -> UntypedAPIFuture:
    if body.sampling_session_id is None:
        raise InvalidRequestError.of("sampling_session_id", None, "a sampler that create_sampling_session made")
    _check_supported(body)
    wanted = SampleInput(
        _model_input(body.prompt),
        body.num_samples,
        _sampling_params(body.sampling_params),
        bool(body.prompt_logprobs),
        body.topk_prompt_logprobs,
        body.topk_sample_logprobs,
        body.prompt_logprobs_last_n,
        _prompt_targets(body),
        body.target_prompt_logprobs is not None and body.target_prompt_logprobs.sparse_crow_indices is not None,
        body.prompt_alt_tokens_k,
    )
    check_sample(wanted)
    made = await broker.submit(
        body.sampling_session_id,
        seq_of(body.seq_id),
        "sample",
        "sample",
        encode(wanted),
        planned_tokens(wanted),
        wanted.num_samples,
        prefix=prefix_marks(wanted.prompt),
    )
    sequences = [f"{made.future}:{i}" for i in range(body.num_samples)]
    return UntypedAPIFuture(request_id=str(made), sample_sequence_ids=sequences)


def _check_supported(body: SampleRequest) -> None:
    if body.record_stability_info:
        raise NotSupportedError("stability information is not recorded", field="record_stability_info")
    if body.prompt_logprobs_last_n is not None and not body.prompt_logprobs:
        raise InvalidRequestError.of("prompt_logprobs_last_n", body.prompt_logprobs_last_n, "prompt_logprobs as well")


def _prompt_targets(body: SampleRequest) -> lorry.TensorData | None:
    """[prompt - 1, K] int64, -1 in the cells that a sparse tensor does not list."""
    sent = body.target_prompt_logprobs
    if sent is None:
        return None
    name = "target_prompt_logprobs"
    if sent.dtype != "int64" or sent.shape is None or len(sent.shape) != 2:
        raise InvalidRequestError.of(name, (sent.dtype, sent.shape), "int64 token ids of shape [len(prompt) - 1, K]")
    shape = check_shape(name, sent.shape)
    values = np.asarray(sent.data, dtype=np.int64)
    if sent.sparse_crow_indices is None or sent.sparse_col_indices is None:
        return lorry.TensorData(fill(name, values, shape))
    starts, columns = (np.asarray(i, dtype=np.int64) for i in (sent.sparse_crow_indices, sent.sparse_col_indices))
    return lorry.TensorData(unfold(name, values, starts, columns, shape, -1))


def _model_input(prompt: SdkModelInput) -> model_input.ModelInput:
    chunks: list[model_input.Chunk] = []
    for i, chunk in enumerate(prompt.chunks):
        match chunk:
            case EncodedTextChunk():
                chunks.append(model_input.EncodedTextChunk(list(chunk.tokens)))
            case ImageChunk():
                chunks.append(model_input.ImageChunk(chunk.data, chunk.format, chunk.expected_tokens))
            case _:
                wanted = "text, or an image with its bytes: Lorry keeps none and fetches none"
                raise NotSupportedError(f"prompt.chunks[{i}] is {chunk.type}, expected {wanted}", field="prompt")
    return model_input.ModelInput(chunks)


def _sampling_params(params: SdkSamplingParams) -> lorry.SamplingParams:
    """Seeds are folded into 63 bits, as the SDK's protocol says that servers do."""
    stop = params.stop
    return lorry.SamplingParams(
        max_tokens=params.max_tokens,
        seed=None if params.seed is None else params.seed % _SEEDS,
        stop=stop if stop is None or isinstance(stop, str) else list(stop),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
    )
