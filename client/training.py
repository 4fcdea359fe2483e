"""One training run: forward, backward, step, save and load, in the order in which they were called."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..wire.catalogue_messages import Query
from ..wire.client_messages import CommandArguments, Submit
from ..wire.codec import decode, encode
from ..wire.commands import (
    CommandKind,
    ForwardBackwardInput,
    OptimStepInput,
    check_adam_params,
    check_forward_backward,
    planned_length,
)
from ..wire.errors import LorryError
from ..wire.ids import LaneId, RunId, future_id
from ..wire.metrics import LogMetrics, point_of
from ..wire.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFnType,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TensorData,
)
from .connection import Connection
from .deadlines import time_left
from .futures import Future
from .requests import Acknowledgement
from .sampling import SamplingClient, create_sampler
from .tokenizers import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

log = logging.getLogger("lorry")

CustomLossFn: TypeAlias = "Callable[[list[Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]"


class TrainingClient:
    """Commands take effect in the order of the calls; each call returns at once with a Future of its result.

    The `_async` form of a call returns the same Future once the server has journalled the command. Mistakes that show
    without the model (shapes, names, non-finite numbers) raise InvalidRequestError at the call.
    """

    def __init__(self, connection: Connection, run: RunId, next_seq: int = 0) -> None:
        self._connection, self._run, self._next_seq = connection, run, next_seq

    @property
    def model_id(self) -> str:
        return self._run

    # Forward and backward --------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Logprobs of the targets and the loss, without gradients."""
        return self._pass("forward", data, loss_fn, loss_fn_config)[0]

    async def forward_async(
        self, data: Sequence[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        return await _acknowledged(self._pass("forward", data, loss_fn, loss_fn_config))

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """The same, and the gradient is added to what waits for the next `optim_step`. Losses are sums over tokens."""
        return self._pass("forward_backward", data, loss_fn, loss_fn_config)[0]

    async def forward_backward_async(
        self, data: Sequence[Datum], loss_fn: LossFnType, loss_fn_config: Mapping[str, float] | None = None
    ) -> Future[ForwardBackwardOutput]:
        return await _acknowledged(self._pass("forward_backward", data, loss_fn, loss_fn_config))

    async def forward_backward_custom_async(
        self, data: Sequence[Datum], loss_fn: CustomLossFn
    ) -> Future[ForwardBackwardOutput]:
        """Any differentiable function of the logprobs, computed here, with torch: `loss_fn(data, logprobs)` gets one
        logprob tensor [N] per datum and returns a scalar loss and metrics.

        A forward brings the logprobs; then cross_entropy with weights -d loss / d logprobs has exactly its gradient.
        """
        import torch

        plain = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
        output = await self.forward(plain, "cross_entropy")
        logprobs = [o["logprobs"].to_torch().clone().requires_grad_() for o in output.loss_fn_outputs]
        loss, metrics = loss_fn(list(data), logprobs)
        gradients = torch.autograd.grad(loss, logprobs, allow_unused=True)
        weighted = [
            Datum(d.model_input, d.loss_fn_inputs | {"weights": TensorData.from_torch(-_gradient(g, p))})
            for d, g, p in zip(plain, gradients, logprobs, strict=True)
        ]

        def with_metrics(payload: bytes) -> ForwardBackwardOutput:
            result = decode(payload, ForwardBackwardOutput)
            return ForwardBackwardOutput(result.loss_fn_output_type, result.loss_fn_outputs, metrics)

        request = _forward_backward_input(weighted, "cross_entropy", None)
        return await _acknowledged(self._submit("forward_backward", request, with_metrics, *_size(weighted)))

    def _pass(
        self, kind: CommandKind, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None
    ) -> "_Submitted[ForwardBackwardOutput]":
        request = _forward_backward_input(data, loss_fn, loss_fn_config)
        return self._submit(kind, request, _to(ForwardBackwardOutput), *_size(data))

    # Step ------------------------------------------------------------------------------------------------------------

    def optim_step(self, adam_params: AdamParams) -> Future[OptimStepResponse]:
        """One Adam step with the gradients added up since the last one."""
        return self._step(adam_params)[0]

    async def optim_step_async(self, adam_params: AdamParams) -> Future[OptimStepResponse]:
        return await _acknowledged(self._step(adam_params))

    def _step(self, adam_params: AdamParams) -> "_Submitted[OptimStepResponse]":
        check_adam_params(adam_params)
        return self._submit("optim_step", OptimStepInput(adam_params), _to(OptimStepResponse))

    # Save and load ---------------------------------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:
        """Weights, moments and step, as `tinker://RUN/weights/NAME`. With `overwrite`, a name that is taken leads here
        from now on; what came from its former weights keeps them."""
        return self._save(name, ttl_seconds, overwrite, user_metadata)[0]

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:
        return await _acknowledged(self._save(name, ttl_seconds, overwrite, user_metadata))

    def _save(
        self, name: str, ttl_seconds: int | None, overwrite: bool, user_metadata: Mapping[str, str] | None
    ) -> "_Submitted[SaveWeightsResponse]":
        arguments = CommandArguments(
            name=name, ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=dict(user_metadata or {})
        )
        return self._submit("save_state", None, _to(SaveWeightsResponse), arguments=arguments)

    def load_state(self, path: str) -> Future[LoadWeightsResponse]:
        """Weights of a `save_state`; the optimizer starts afresh, and no gradient is pending."""
        return self._load(path, optimizer=False)[0]

    async def load_state_async(self, path: str) -> Future[LoadWeightsResponse]:
        return await _acknowledged(self._load(path, optimizer=False))

    def load_state_with_optimizer(self, path: str) -> Future[LoadWeightsResponse]:
        """Weights, moments and step count of a `save_state`; no gradient is pending."""
        return self._load(path, optimizer=True)[0]

    async def load_state_with_optimizer_async(self, path: str) -> Future[LoadWeightsResponse]:
        return await _acknowledged(self._load(path, optimizer=True))

    def _load(self, path: str, optimizer: bool) -> "_Submitted[LoadWeightsResponse]":
        arguments = CommandArguments(path=path, optimizer=optimizer)
        return self._submit("load_state", None, _to(LoadWeightsResponse), arguments=arguments)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None
    ) -> Future[SaveWeightsForSamplerResponse]:
        """The weights alone, as `tinker://RUN/sampler_weights/NAME`: a folder that PEFT and vLLM load."""
        return self._save_for_sampler(name, ttl_seconds)[0]

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None
    ) -> Future[SaveWeightsForSamplerResponse]:
        return await _acknowledged(self._save_for_sampler(name, ttl_seconds))

    def _save_for_sampler(
        self, name: str | None, ttl_seconds: int | None
    ) -> "_Submitted[SaveWeightsForSamplerResponse]":
        arguments = CommandArguments(name=name, ttl_seconds=ttl_seconds, unnamed=name is None)
        return self._submit("save_weights_for_sampler", None, _to(SaveWeightsForSamplerResponse), arguments=arguments)

    # Numbers ---------------------------------------------------------------------------------------------------------

    def log_metrics(self, metrics: Mapping[str, float], step: int, at: float | None = None) -> Acknowledgement:
        """Numbers of your own loop, such as a reward, under a step of your counting, kept as long as the run. Awaiting
        what it returns waits until they are durable; should the server refuse them, that is logged as a warning, too.

        Under a step that has some, names are added, and the last value of a name holds. `at` is in Unix seconds, by
        default when they arrive. Raises InvalidRequestError for what is no number, no count or no name.
        """
        point = point_of(step, metrics, at)
        message = LogMetrics(self._connection.next_request(), self._run)
        return self._connection.say(message, encode([point]), _not_kept)

    async def log_metrics_async(self, metrics: Mapping[str, float], step: int, at: float | None = None) -> None:
        """The same; they are durable when it returns. Raises LimitReachedError where the run has too many names."""
        await self.log_metrics(metrics, step, at)

    # Sampling, and what is known of the run --------------------------------------------------------------------------

    async def create_sampling_client_async(self, model_path: str) -> SamplingClient:
        return await create_sampler(self._connection, model_path=model_path)

    async def save_weights_and_get_sampling_client_async(self, name: str | None = None) -> SamplingClient:
        """A sampling client of the weights as they are now, after everything called before.

        Without a `name` they are kept while the client is used, and for the next four saves of this kind at least.
        """
        saved = await self._save_for_sampler(name, None)[0]
        return await self.create_sampling_client_async(saved.path)

    async def get_info_async(self) -> GetInfoResponse:
        return await self._connection.ask(Query(self._connection.next_request(), "run", self._run), GetInfoResponse)

    async def get_tokenizer_async(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, loaded here by `transformers`, which takes a second or two the first time."""
        return await load_tokenizer((await self.get_info_async()).tokenizer_id)

    # ------------------------------------------------------------------------------------------------------------------

    def _submit(
        self,
        kind: CommandKind,
        request: object,
        convert: Callable[[bytes], T],
        tokens: int = 0,
        rows: int = 0,
        arguments: CommandArguments | None = None,
    ) -> "_Submitted[T]":
        payload = b"" if request is None else encode(request)
        lane, seq = LaneId(self._run), self._next_seq
        future = Future(future_id(lane, seq), convert, self._connection.cancel)
        number = self._connection.next_request()
        # What is of a wrong type is told here: a seq that was sent is used.
        checked = decode(encode(arguments or CommandArguments()), CommandArguments)
        header = Submit(number, lane, seq, kind, tokens, rows, checked, timeout_s=time_left())
        acknowledgement = self._connection.submit(header, payload, future)
        self._next_seq += 1
        return future, acknowledgement


_Submitted: TypeAlias = tuple[Future[T], Acknowledgement]


async def _acknowledged(submitted: _Submitted[T]) -> Future[T]:
    future, acknowledgement = submitted
    await acknowledgement.wait()
    return future


def _not_kept(error: LorryError) -> None:
    log.warning("metrics were not kept: %s", error)


def _to(kind: type[T]) -> Callable[[bytes], T]:
    return lambda payload: decode(payload, kind)


def _forward_backward_input(
    data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None
) -> ForwardBackwardInput:
    request = ForwardBackwardInput(list(data), loss_fn, dict(loss_fn_config or {}))
    check_forward_backward(request)
    return request


def _size(data: Sequence[Datum]) -> tuple[int, int]:
    return sum(planned_length(datum.model_input) for datum in data), len(data)


def _gradient(gradient: Any, like: Any) -> Any:
    return gradient if gradient is not None else like.new_zeros(like.shape)
