"""The commands of the API and what each carries. A command is one accepted request of one run or sampler.

The checks here are pure. The client makes them first, so that a mistake is reported where it was made; the actor makes
them again, because it trusts nobody, and with the model's own limits.
"""

import math
from collections.abc import Collection
from typing import Literal, TypeAlias, cast, get_args

import msgspec
import numpy as np

from .custom_loss import CustomLoss, check_custom_loss
from .errors import InvalidRequestError
from .model_input import ImageChunk, ImageFormat, ModelInput
from .types import AdamParams, Datum, ExpertLora, LoraConfig, SamplingParams, TensorData

CommandKind: TypeAlias = Literal[
    "forward",
    "forward_backward",
    "optim_step",
    "save_state",
    "save_weights_for_sampler",
    "load_state",
    "sample",
    "compute_logprobs",
]
SAMPLING_KINDS: frozenset[CommandKind] = frozenset(("sample", "compute_logprobs"))

REPLAYED_KINDS: frozenset[CommandKind] = frozenset(("forward_backward", "optim_step", "load_state"))
"""What changes a run's state: it is rebuilt by these alone."""

PHASES: dict[CommandKind, int] = {
    "forward": 0,
    "forward_backward": 0,
    "optim_step": 1,
    "save_state": 2,
    "save_weights_for_sampler": 2,
    "load_state": 3,
}
"""Inside a micro-batch all commands of a phase run together, phase after phase; see `scheduler.planning.lanes`."""


def phase_may_follow(phase: int, after: int) -> bool:
    """Whether a run's command of `phase` may share a micro-batch with one of phase `after` that precedes it."""
    return phase > after or (phase == after and phase not in (PHASES["optim_step"], PHASES["load_state"]))


class ForwardBackwardInput(msgspec.Struct, frozen=True):
    """Carried by forward and forward_backward. The loss called custom comes with them, as `custom`."""

    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float] = {}
    custom: CustomLoss | None = None


class OptimStepInput(msgspec.Struct, frozen=True):
    adam_params: AdamParams


MAX_PROMPT_ALT_TOKENS = 64


class SampleInput(msgspec.Struct, frozen=True):
    """`target_prompt_logprobs` [prompt - 1, K] int64: cell [i, j] is a token whose logprob in place of prompt token
    i + 1 is wanted, or -1. `sparse_targets` says that they came as a sparse tensor, and the answer is to leave as one.
    """

    prompt: ModelInput
    num_samples: int
    sampling_params: SamplingParams
    include_prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: TensorData | None = None
    sparse_targets: bool = False
    prompt_alt_tokens_k: int = 0


_UNKNOWN_LENGTH_TOKENS = 256
"""What a sample without `max_tokens` is planned at, per sequence."""
_UNKNOWN_IMAGE_TOKENS = 1024
"""And an image without `expected_tokens`."""


def planned_length(tokens: ModelInput) -> int:
    """What it is planned at, before its actor counts an image's tokens; billed is what they come to."""
    return sum(
        _UNKNOWN_IMAGE_TOKENS if isinstance(chunk, ImageChunk) and chunk.expected_tokens is None else chunk.length
        for chunk in tokens.chunks
    )


def planned_tokens(request: SampleInput) -> int:
    """What a sample is planned at, before anybody knows where its sequences stop; billed is what they come to."""
    new = request.sampling_params.max_tokens or _UNKNOWN_LENGTH_TOKENS
    return planned_length(request.prompt) + request.num_samples * new


class ComputeLogprobsInput(msgspec.Struct, frozen=True):
    prompt: ModelInput


class LossSpec(msgspec.Struct, frozen=True):
    """Which `loss_fn_inputs` a loss needs and may have, and its `loss_fn_config` keys with their defaults."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    config: dict[str, float] = {}


_POLICY = frozenset(("target_tokens", "logprobs", "advantages"))
_MASKS = frozenset(("weights", "mask"))
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: dict[str, LossSpec] = {
    "cross_entropy": LossSpec(frozenset(("target_tokens",)), frozenset(("weights",))),
    "importance_sampling": LossSpec(_POLICY, _MASKS),
    "ppo": LossSpec(_POLICY, _MASKS, _CLIP),
    "cispo": LossSpec(_POLICY, _MASKS, _CLIP),
    "dro": LossSpec(_POLICY, _MASKS, {"beta": 0.05}),
    "gspo": LossSpec(_POLICY | {"sequence_ratio_mask"}, _MASKS, _CLIP),
}
"""Inputs, keys and clip thresholds as tinker-docs.thinkingmachines.ai/tinker/losses gives them (both epsilons 0.2;
beta 0.05 is the value of its example). A custom loss needs no entry: the client computes g = d loss / d logprobs and
sends cross_entropy with `weights` = -g, whose gradient is g."""

_OF_SEVERAL = ("cross_entropy", "custom")
"""Losses that may have K targets for a token."""

MAX_SEQ = 2**63 - 1
MAX_RANK = 2**31
"""Beyond any use; what a model takes is its actors' word."""
MAX_NEW_TOKENS = 2**31
"""Beyond any context."""


def check_forward_backward(
    request: ForwardBackwardInput, vocab_size: int | None = None, max_context: int | None = None
) -> None:
    """Raises InvalidRequestError naming the datum and the field, as in `data[3].loss_fn_inputs['weights']`."""
    spec = _spec(request)
    for key, value in request.loss_fn_config.items():
        if key not in spec.config:
            known = ", ".join(spec.config) or "no keys at all"
            raise InvalidRequestError.of("loss_fn_config", key, f"for {request.loss_fn} {known}")
        if not math.isfinite(value):
            raise InvalidRequestError.of(f"loss_fn_config[{key!r}]", value, "a finite number")
    if not request.data:
        raise InvalidRequestError.of("data", [], "at least one datum")
    for i, datum in enumerate(request.data):
        _check_datum(f"data[{i}]", datum, spec, request.loss_fn, vocab_size, max_context)


def _spec(request: ForwardBackwardInput) -> LossSpec:
    """Raises InvalidRequestError for a loss that there is not."""
    if (request.loss_fn == "custom") != (request.custom is not None):
        raise InvalidRequestError.of("loss_fn", request.loss_fn, "custom where a loss comes with it, and only there")
    if request.custom is not None:
        check_custom_loss(request.custom)
        return LossSpec(frozenset(("target_tokens", *request.custom.names)))
    spec = LOSSES.get(request.loss_fn)
    if spec is None:
        raise InvalidRequestError.of("loss_fn", request.loss_fn, f"one of {', '.join(LOSSES)}, custom")
    return spec


def _check_datum(
    name: str, datum: Datum, spec: LossSpec, loss_fn: str, vocab_size: int | None, max_context: int | None
) -> None:
    inputs = datum.loss_fn_inputs
    if missing := spec.required - inputs.keys():
        raise InvalidRequestError.of(f"{name}.loss_fn_inputs", sorted(inputs), f"{', '.join(sorted(missing))} as well")
    if loss_fn != "custom" and (unknown := inputs.keys() - spec.required - spec.optional):
        wanted = ", ".join(sorted(spec.required | spec.optional))
        raise InvalidRequestError.of(f"{name}.loss_fn_inputs", sorted(unknown), f"for {loss_fn} only {wanted}")
    check_tokens(f"{name}.model_input", datum.model_input, vocab_size, max_context)
    length, targets = datum.model_input.known_length, inputs["target_tokens"]
    several = loss_fn in _OF_SEVERAL and len(targets.shape) == 2
    fits = length is None or targets.shape[:1] == [length]
    if not (fits and (several or len(targets.shape) == 1)):
        n = "tokens" if length is None else length
        shape = f"[{n}]" + (f" or [{n}, K]" if loss_fn in _OF_SEVERAL else "")
        raise InvalidRequestError.of(f"{name}.loss_fn_inputs['target_tokens'].shape", targets.shape, shape)
    if targets.dtype != "int64":
        raise InvalidRequestError.of(f"{name}.loss_fn_inputs['target_tokens'].dtype", targets.dtype, "int64")
    _check_range(f"{name}.loss_fn_inputs['target_tokens']", targets.to_numpy(), vocab_size)
    for key, tensor in inputs.items():
        if loss_fn != "custom" and tensor.shape != targets.shape:
            raise InvalidRequestError.of(f"{name}.loss_fn_inputs[{key!r}].shape", tensor.shape, str(targets.shape))
        if not np.isfinite(values := tensor.to_numpy()).all():
            bad = values[~np.isfinite(values)][0]
            raise InvalidRequestError.of(f"{name}.loss_fn_inputs[{key!r}]", float(bad), "finite numbers")
        if key == "sequence_ratio_mask" and not values.any():
            raise InvalidRequestError.of(f"{name}.loss_fn_inputs[{key!r}]", 0.0, "at least one token that is not 0")


def check_tokens(name: str, tokens: ModelInput, vocab_size: int | None, max_context: int | None) -> None:
    for i, chunk in enumerate(tokens.chunks):
        if isinstance(chunk, ImageChunk):
            _check_image(f"{name}.chunks[{i}]", chunk)
    length = tokens.known_length
    if length == 0:
        raise InvalidRequestError.of(name, [], "at least one token")
    if max_context is not None and length is not None and length > max_context:
        raise InvalidRequestError.of(f"{name}.length", length, f"at most {max_context}, the model's context")
    for chunk in tokens.chunks:
        if isinstance(chunk, ImageChunk):
            continue
        try:
            values = np.asarray(chunk.tokens, dtype=np.int64)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequestError.of(name, chunk.tokens[:8], "integers below 2**63") from None
        _check_range(name, values, vocab_size)


def _check_image(name: str, image: ImageChunk) -> None:
    """As far as can be told without a look at its bytes, which is the actors' alone."""
    if not isinstance(cast("object", image.data), bytes):
        raise InvalidRequestError.of(f"{name}.data", type(image.data).__name__, "bytes, those of a PNG or JPEG file")
    if image.format not in get_args(ImageFormat):
        raise InvalidRequestError.of(f"{name}.format", image.format, "'png' or 'jpeg'")
    tokens = cast("object", image.expected_tokens)
    if tokens is not None and not (isinstance(tokens, int) and 1 <= tokens <= MAX_NEW_TOKENS):
        wanted = f"a whole number from 1 to {MAX_NEW_TOKENS}, or None"
        raise InvalidRequestError.of(f"{name}.expected_tokens", tokens, wanted)


def _check_range(name: str, tokens: np.ndarray, vocab_size: int | None) -> None:
    if not tokens.size:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = f"below {vocab_size}" if vocab_size is not None else "of the vocabulary"
        raise InvalidRequestError.of(name, low if low < 0 else high, f"token ids from 0 {limit}")


def check_adam_params(params: AdamParams) -> None:
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if not math.isfinite(value) or value < 0:
            raise InvalidRequestError.of(f"adam_params.{name}", value, "a finite number, 0 or above")
    for name in ("beta1", "beta2"):
        if getattr(params, name) >= 1:
            raise InvalidRequestError.of(f"adam_params.{name}", getattr(params, name), "a number below 1")


def check_lora_config(
    config: LoraConfig,
    max_rank: int | None = None,
    trainable: Collection[str] | None = None,
    frozen_experts: str | None = None,
) -> None:
    """With what is known of a model: the largest rank, the groups of layers (attn, mlp, unembed) that it trains, and
    the class of its experts where they are none."""
    limit = MAX_RANK if max_rank is None else max_rank
    if not 1 <= config.rank <= limit:
        raise InvalidRequestError.of("rank", config.rank, f"a whole number from 1 to {limit}")
    if not (config.train_attn or config.train_mlp or config.train_unembed):
        raise InvalidRequestError.of("train_attn, train_mlp, train_unembed", False, "at least one of them true")
    if config.expert_lora not in get_args(ExpertLora):
        raise InvalidRequestError.of("expert_lora", config.expert_lora, "'shared' or 'independent'")
    if not (math.isfinite(config.alpha) and config.alpha > 0):
        raise InvalidRequestError.of("alpha", config.alpha, "a finite number above 0")
    if config.target_modules is not None and not all(config.target_modules or [""]):
        raise InvalidRequestError.of("target_modules", config.target_modules, "names of layers, or None for all")
    if config.seed is not None and not 0 <= config.seed < 2**63:
        raise InvalidRequestError.of("seed", config.seed, "a whole number from 0 to 2**63 - 1")
    for group in ("attn", "mlp", "unembed"):
        if trainable is not None and getattr(config, f"train_{group}") and group not in trainable:
            frozen = group == "mlp" and frozen_experts
            why = f"its MLPs are {frozen_experts}, which stay frozen" if frozen else "it has no such layer"
            raise InvalidRequestError.of(f"train_{group}", True, f"False for this base model: {why}")


def most_new_tokens(prompt: int, max_context: int) -> int:
    """What may be sampled after a prompt of that many tokens.

    One token even after a prompt that fills the context: what is sampled last is never fed to the model.
    """
    return max(1, max_context - prompt)


def check_sample(request: SampleInput, vocab_size: int | None = None, max_context: int | None = None) -> None:
    check_tokens("prompt", request.prompt, vocab_size, max_context)
    params = request.sampling_params
    if not 1 <= request.num_samples <= 1024:
        raise InvalidRequestError.of("num_samples", request.num_samples, "a whole number from 1 to 1024")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise InvalidRequestError.of("sampling_params.temperature", params.temperature, "0 (greedy) or above")
    if not 0 < params.top_p <= 1:
        raise InvalidRequestError.of("sampling_params.top_p", params.top_p, "above 0 and at most 1")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidRequestError.of("sampling_params.top_k", params.top_k, "-1 (off) or a whole number from 1")
    if params.seed is not None and not 0 <= params.seed < 2**63:
        raise InvalidRequestError.of("sampling_params.seed", params.seed, "a whole number from 0 to 2**63 - 1")
    if params.max_tokens is not None and not 1 <= params.max_tokens <= MAX_NEW_TOKENS:
        wanted = f"a whole number from 1 to {MAX_NEW_TOKENS}"
        raise InvalidRequestError.of("sampling_params.max_tokens", params.max_tokens, wanted)
    length = request.prompt.known_length
    if length is not None:
        _check_against_prompt(request, length, vocab_size, max_context)
    alternatives = request.prompt_alt_tokens_k
    if not 0 <= alternatives <= MAX_PROMPT_ALT_TOKENS:
        raise InvalidRequestError.of("prompt_alt_tokens_k", alternatives, f"0 to {MAX_PROMPT_ALT_TOKENS}")
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if not 0 <= getattr(request, name) <= 20:
            raise InvalidRequestError.of(name, getattr(request, name), "a whole number from 0 to 20")
    _check_stop(params)


def _check_against_prompt(request: SampleInput, length: int, vocab_size: int | None, max_context: int | None) -> None:
    """What depends on the prompt's `length`."""
    params = request.sampling_params
    room = None if max_context is None else most_new_tokens(length, max_context)
    if room is not None and room < (params.max_tokens or 1):
        wanted = f"at most {room}: the prompt has {length} tokens and the context {max_context}"
        raise InvalidRequestError.of("sampling_params.max_tokens", params.max_tokens, wanted)
    last = request.prompt_logprobs_last_n
    if last is not None and not 1 <= last < length:
        wanted = f"a whole number from 1 to {length - 1}, one below the prompt's length"
        if length == 1:
            wanted = "None: the one token of the prompt has no logprob, for nothing comes before it"
        raise InvalidRequestError.of("prompt_logprobs_last_n", last, wanted)
    if request.target_prompt_logprobs is not None:
        _check_prompt_targets(request.target_prompt_logprobs, length - 1, vocab_size)


def _check_prompt_targets(targets: TensorData, rows: int, vocab_size: int | None) -> None:
    name = "target_prompt_logprobs"
    if len(targets.shape) != 2 or targets.shape[0] != rows:
        raise InvalidRequestError.of(
            f"{name}.shape", targets.shape, f"[{rows}, K], a row for every token but the first"
        )
    if targets.dtype != "int64":
        raise InvalidRequestError.of(f"{name}.dtype", targets.dtype, "int64")
    values = targets.to_numpy()
    _check_range(name, values[values != -1], vocab_size)


def _check_stop(params: SamplingParams) -> None:
    stop = params.stop if isinstance(params.stop, list) else [params.stop] if params.stop is not None else []
    for entry in stop:
        if entry == "" or (isinstance(entry, int) and entry < 0):
            raise InvalidRequestError.of("sampling_params.stop", entry, "non-empty strings or token ids")
