"""The words of the API: data, parameters and results, with the names and fields that the Tinker SDK uses.

They are plain typed structs without behaviour beyond conversion. The gateway, and only it, knows the SDK's own types.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt

from .ids import ProjectId
from .model_input import ModelInput

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]
LossFnType: TypeAlias = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
StopReason: TypeAlias = Literal["length", "stop"]

_INPUT_DTYPES: dict[str, TensorDtype] = {"target_tokens": "int64"}


class TensorData:
    """A dense tensor: int64 or float32, any shape. Build it from lists, numpy or torch; read it as numpy or torch."""

    __slots__ = ("_array",)

    def __init__(
        self,
        data: Sequence[float] | npt.NDArray[Any],
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        """`data` is flat or nested; `shape` reshapes it. Without `dtype`, integers become int64, the rest float32.

        Raises ValueError where `data` does not fill `shape`, or is ragged.
        """
        array = np.asarray(data)
        if dtype is None:
            dtype = "int64" if array.dtype.kind in "iub" else "float32"
        array = np.asarray(array, dtype=dtype, order="C")
        self._array: npt.NDArray[Any] = array if shape is None else array.reshape(tuple(shape))

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> "TensorData":
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        tensor = tensor.detach().cpu()
        return cls((tensor.float() if tensor.is_floating_point() else tensor).numpy())

    @property
    def dtype(self) -> TensorDtype:
        return "int64" if self._array.dtype.kind == "i" else "float32"

    @property
    def shape(self) -> list[int]:
        return list(self._array.shape)

    @property
    def data(self) -> list[float]:
        """Every element in row-major order, as Python numbers."""
        return self._array.ravel().tolist()

    def tolist(self) -> list[Any]:
        return self._array.tolist()

    def to_numpy(self) -> npt.NDArray[Any]:
        return self._array

    def to_torch(self) -> "torch.Tensor":
        import torch  # importing lorry must not import torch: a laptop without it can still drive a run

        return torch.from_numpy(self._array if self._array.flags.writeable else self._array.copy())

    def __len__(self) -> int:
        return len(self._array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and self.dtype == other.dtype and np.array_equal(self._array, other._array)

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape})"


TensorLike: TypeAlias = (
    "TensorData | ModelInput | Sequence[float] | Sequence[Sequence[float]] | npt.NDArray[Any] | torch.Tensor"
)
"""What becomes a TensorData where a Datum is made."""


class Datum(msgspec.Struct, frozen=True):
    """One training sequence: `model_input` [N] and what its loss needs, such as `target_tokens` [N], `weights` [N].

    Position i of `model_input` predicts `target_tokens[i]`. Lists, numpy arrays and torch tensors are converted.
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = {}

    if TYPE_CHECKING:  # what may be given is more than what it is then, which is all that an annotation can say

        def __init__(self, model_input: ModelInput, loss_fn_inputs: Mapping[str, TensorLike] = ...) -> None: ...

    def __post_init__(self) -> None:
        inputs = cast("Mapping[str, Any]", self.loss_fn_inputs)
        if all(isinstance(value, TensorData) for value in inputs.values()):
            return
        converted = {name: _tensor(name, value) for name, value in inputs.items()}
        msgspec.structs.force_setattr(self, "loss_fn_inputs", converted)


def _tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if isinstance(value, ModelInput):
        value = value.to_ints()
    if hasattr(value, "detach"):
        return TensorData.from_torch(value)
    return TensorData(value, _INPUT_DTYPES.get(name, "float32"))


FileLayout: TypeAlias = Literal["peft", "tinker"]
ExpertLora: TypeAlias = Literal["shared", "independent"]
Quantization: TypeAlias = Literal["none", "nf4"]


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`seed` None lets the server draw one. The scale is alpha / rank, and alpha 32, as in 'LoRA Without Regret', but
    for adapters that were made elsewhere.

    `expert_lora` is of a mixture's routed experts: `shared`, they have A of gate and up and B of down in common, as on
    the hosted service; `independent`, each has its own. `target_modules` are as PEFT's: of what `train_mlp`,
    `train_attn` and `train_unembed` say, only layers of such a name, whole or from a dot on, are trained.
    """

    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    expert_lora: ExpertLora = "shared"
    alpha: float = 32.0
    target_modules: list[str] | None = None


class AdamParams(msgspec.Struct, frozen=True, kw_only=True):
    """One step of Adam with decoupled weight decay. `grad_clip_norm` 0 leaves the gradient as it is."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """`stop` None means the model's end-of-sequence tokens, [] none at all, else strings or token ids.

    `max_tokens` None means as many as the context holds; `temperature` 0 is greedy; `top_k` -1 is off.
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


LossFnOutput: TypeAlias = dict[str, TensorData]
TopkLogprobs: TypeAlias = list[tuple[int, float]]


class ForwardBackwardOutput(msgspec.Struct, frozen=True):
    """`loss_fn_outputs` has one dict per datum, with `logprobs` in the shape of its targets."""

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float]


class OptimStepResponse(msgspec.Struct, frozen=True):
    metrics: dict[str, float]


class SaveWeightsResponse(msgspec.Struct, frozen=True):
    path: str


class SaveWeightsForSamplerResponse(msgspec.Struct, frozen=True):
    """`sampling_session_id` is that of the sampler which was asked for with the weights, if one was."""

    path: str
    sampling_session_id: str | None = None


class LoadWeightsResponse(msgspec.Struct, frozen=True):
    path: str


class SampledSequence(msgspec.Struct, frozen=True):
    """`tokens` [n] with the stop token, if one ended it; `logprobs` [n] of the tempered distribution, before top-k
    and top-p cut it (greedy sequences report the untempered one)."""

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float]
    topk_logprobs: list[TopkLogprobs] | None = None


class PromptAltTokens(msgspec.Struct, frozen=True):
    """What else might have stood in the prompt: row i has k independent draws in place of token i + 1."""

    tokens: TensorData
    """[prompt - 1, k] int64, drawn at the request's temperature, uncut by top-k and top-p."""
    logprobs: TensorData
    """[prompt - 1, k] float32, of the model as it is."""


class SampleResponse(msgspec.Struct, frozen=True):
    """`prompt_logprobs` [prompt], of the model as it is; its first entry is None, since nothing predicts it.

    `target_prompt_logprobs` [prompt - 1, K] float32: of the tokens that the request listed, NaN where it listed none.
    `sparse_targets` repeats the request's. `prompt_cache_hit_tokens` of the `prompt_tokens`, those of images among
    them, had been computed before.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[TopkLogprobs | None] | None = None
    target_prompt_logprobs: TensorData | None = None
    sparse_targets: bool = False
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_tokens: int = 0


class SupportedModel(msgspec.Struct, frozen=True):
    """`max_context_length` is None while the model is being loaded."""

    model_name: str
    max_context_length: int | None
    trainable: bool = True
    sampleable: bool = True


class GetServerCapabilitiesResponse(msgspec.Struct, frozen=True):
    supported_models: list[SupportedModel]


class GetInfoResponse(msgspec.Struct, frozen=True):
    """`tokenizer_id` is what `AutoTokenizer.from_pretrained` takes on the server's machine."""

    model_id: str
    model_name: str
    lora_rank: int
    tokenizer_id: str
    is_lora: bool = True


DEFAULT_PROJECT = ProjectId("default")
"""Where everything is that was put into no other."""


class Checkpoint(msgspec.Struct, frozen=True):
    """`time` and `expires_at` are Unix seconds; `expires_at` None never expires."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: float
    tinker_path: str
    size_bytes: int
    expires_at: float | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    project: ProjectId = DEFAULT_PROJECT


class Project(msgspec.Struct, frozen=True):
    """`created_at` is in Unix seconds, None for the one that was always there."""

    name: ProjectId
    created_at: float | None
    training_runs: int


class TrainingRun(msgspec.Struct, frozen=True):
    """`last_request_time` is in Unix seconds."""

    training_run_id: str
    base_model: str
    model_owner: str
    lora_rank: int
    last_request_time: float
    is_lora: bool = True
    user_metadata: dict[str, str] | None = None
    session_id: str | None = None
    project: ProjectId = DEFAULT_PROJECT


class WeightsInfo(msgspec.Struct, frozen=True):
    """What it takes to make a run that a checkpoint can be loaded into.

    `folder` is where its files are below the broker's checkpoints, for a gateway that sees them.
    """

    tinker_path: str
    base_model: str
    lora: LoraConfig
    folder: str = ""


class ClientSession(msgspec.Struct, frozen=True):
    """`created_at` is in Unix seconds. `status` is None where the client neither finished nor was heard of lately."""

    session_id: str
    created_at: float
    owner: str
    tags: list[str]
    user_metadata: dict[str, str]
    display_name: str | None
    status: Literal["active", "success", "errored", "interrupted"] | None
    detail: str | None
    training_run_ids: list[str]
    sampler_ids: list[str]
    project: ProjectId = DEFAULT_PROJECT


UsageKind: TypeAlias = Literal["prefill", "cached_prefill", "sample", "train"]
"""A prompt's tokens are `prefill` where they were computed, and `cached_prefill` where they were found computed."""


class AuditEvent(msgspec.Struct, frozen=True):
    """At `at`, in Unix seconds: `event`, such as checkpoint_published, happened to `subject`, of `tenant`; `by` is the
    id of the key that it was done with, or the operator."""

    at: float
    tenant: str
    by: str
    event: str
    subject: str
    detail: dict[str, str] = {}


class UsageEvent(msgspec.Struct, frozen=True):
    """Tokens of one hour, which starts at `hour` in Unix seconds, at one price; or `gb_hours` of what was kept in it,
    and then the price is for a GB and a month of 720 hours."""

    hour: float
    run: str
    session: str | None
    base_model: str
    kind: UsageKind | Literal["storage"]
    tokens: int
    usd_per_million: float
    cost_usd: float
    project: ProjectId = DEFAULT_PROJECT
    gb_hours: float = 0.0


class UsageRow(msgspec.Struct, frozen=True):
    tenant: str
    run: str
    base_model: str
    kind: UsageKind
    tokens: int
    cost_usd: float
