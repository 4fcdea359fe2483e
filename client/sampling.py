"""Sampling from a base model or from saved weights. Requests are independent: they are not ordered among themselves."""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..wire.catalogue_messages import Query, SamplerInfo
from ..wire.client_messages import CommandArguments, CreateSampler, SamplerCreated, Submit
from ..wire.codec import decode, encode
from ..wire.commands import (
    CommandKind,
    ComputeLogprobsInput,
    SampleInput,
    check_sample,
    check_tokens,
    planned_length,
    planned_tokens,
)
from ..wire.ids import FutureId, LaneId, ProjectId, SamplerId, future_id
from ..wire.model_input import ModelInput
from ..wire.prefixes import prefix_marks
from ..wire.types import SampleResponse, SamplingParams, TensorData
from .connection import Connection
from .deadlines import time_left
from .futures import Future
from .streams import SampleStream
from .tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
F = TypeVar("F", bound=Future[Any])


class SamplingClient:
    def __init__(self, connection: Connection, sampler: SamplerId, base_model: str) -> None:
        self._connection, self._sampler, self._base_model = connection, sampler, base_model
        self._next_seq = 0

    @property
    def sampler_id(self) -> str:
        return self._sampler

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        prompt_logprobs_last_n: int | None = None,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
    ) -> Future[SampleResponse]:
        """`num_samples` sequences that continue `prompt`; see SamplingParams, SampledSequence and SampleInput."""
        request = SampleInput(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            prompt_logprobs_last_n,
            target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
        )
        check_sample(request)
        tokens = planned_tokens(request)
        return self._submit(
            "sample", request, prompt, tokens, num_samples, lambda payload: decode(payload, SampleResponse)
        )

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        prompt_logprobs_last_n: int | None = None,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
    ) -> SampleResponse:
        """The same, awaited: as in the Tinker SDK, this returns the result and not a future."""
        return await self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            prompt_logprobs_last_n,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
        )

    def stream(
        self,
        prompt: ModelInput,
        sampling_params: SamplingParams,
        num_samples: int = 1,
        topk_sample_logprobs: int = 0,
    ) -> SampleStream:
        """The tokens of `num_samples` sequences that continue `prompt`, as they are made; see SampleStream."""
        request = SampleInput(prompt, num_samples, sampling_params, topk_sample_logprobs=topk_sample_logprobs)
        check_sample(request)

        def streamed(future: FutureId) -> SampleStream:
            return SampleStream(future, num_samples, self._connection.cancel)

        tokens = planned_tokens(request)
        return self._send("sample", request, prompt, tokens, num_samples, streamed, CommandArguments(stream=True))

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """The model's logprob of each token of `prompt` after those before it; None for the first."""
        check_tokens("prompt", prompt, None, None)
        request = ComputeLogprobsInput(prompt)
        return self._submit(
            "compute_logprobs",
            request,
            prompt,
            planned_length(prompt),
            1,
            lambda payload: decode(payload, SampleResponse).prompt_logprobs or [],
        )

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        return await self.compute_logprobs(prompt)

    def get_base_model(self) -> str:
        return self._base_model

    async def get_tokenizer_async(self) -> "PreTrainedTokenizerBase":
        query = Query(self._connection.next_request(), "sampler", self._sampler)
        return await load_tokenizer((await self._connection.ask(query, SamplerInfo)).tokenizer_id)

    def _submit(
        self,
        kind: CommandKind,
        request: object,
        prompt: ModelInput,
        tokens: int,
        rows: int,
        convert: Callable[[bytes], T],
    ) -> Future[T]:
        def promised(future: FutureId) -> Future[T]:
            return Future(future, convert, self._connection.cancel)

        return self._send(kind, request, prompt, tokens, rows, promised)

    def _send(
        self,
        kind: CommandKind,
        request: object,
        prompt: ModelInput,
        tokens: int,
        rows: int,
        promise: Callable[[FutureId], F],
        arguments: CommandArguments | None = None,
    ) -> F:
        lane, seq, left = LaneId(self._sampler), self._next_seq, time_left()
        self._next_seq += 1
        future = promise(future_id(lane, seq))
        number, marks = self._connection.next_request(), prefix_marks(prompt)
        told = arguments or CommandArguments()
        header = Submit(number, lane, seq, kind, tokens, rows, told, prefix=marks, timeout_s=left)
        self._connection.submit(header, encode(request), future)
        return future


async def create_sampler(
    connection: Connection,
    *,
    base_model: str | None = None,
    model_path: str | None = None,
    project: ProjectId | None = None,
    priority: int = 0,
) -> SamplingClient:
    """In the project of the run that saved the weights, unless one is given."""
    number, nonce = connection.next_request(), secrets.token_hex(16)
    request = CreateSampler(number, nonce, base_model, model_path, project=project, priority=priority)
    created = await connection.ask(request, SamplerCreated)
    return SamplingClient(connection, SamplerId(created.sampler), created.base_model)
