"""Losses that users write: torch.fx graphs as plain data, in the Tinker SDK's form, and what may be in one. Pure.

Nothing of a graph is executed but operations that are listed here by name, whose results have a size that follows from
the sizes of what goes in: so an actor can tell beforehand what a graph will take.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from .errors import InvalidRequestError

Rank: TypeAlias = Literal[0, 1, 2]

NODES_AT_MOST, INPUTS_AT_MOST, ARGUMENTS_AT_MOST = 300, 16, 64
ENCODED_BYTES_AT_MOST = 32 * 1024
_DEPTH_AT_MOST = 5
INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")

_ELEMENTWISE = (
    *("abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal"),
    *("sigmoid", "tanh", "sin", "cos", "atan", "erf", "sign", "floor", "ceil", "round", "trunc", "frac", "relu"),
    *("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "fmax", "fmin", "remainder", "fmod"),
    *("atan2", "hypot", "logaddexp", "xlogy", "lerp", "clamp", "clip", "where", "nan_to_num", "rsub"),
    *("eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan", "isinf", "isclose"),
    *("logical_and", "logical_or", "logical_not", "logical_xor", "masked_fill"),
)
_REDUCTIONS = (
    *("sum", "mean", "prod", "max", "min", "amax", "amin", "logsumexp", "var", "std", "any", "all"),
    *("cumsum", "cumprod", "logcumsumexp", "softmax", "log_softmax", "flip", "roll", "diff"),
)
_SHAPES = ("reshape", "unsqueeze", "squeeze", "flatten", "transpose", "permute", "broadcast_to", "detach", "clone")
_MADE = ("zeros_like", "ones_like", "full_like")
_SEVERAL = ("stack", "cat")
_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "getitem"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "invert"),
)
_NN = (
    *("relu", "elu", "silu", "sigmoid", "tanh", "softmax", "log_softmax", "hardtanh", "leaky_relu"),
    *("smooth_l1_loss", "huber_loss", "mse_loss", "binary_cross_entropy_with_logits"),
)
_AS_TORCH_FX_CALLS_THEM = (
    *("torch._C._nn.softplus", "torch._C._nn.log_sigmoid", "torch._C._nn.gelu", "torch.functional.norm", "getattr"),
)
_MATH = ("exp", "log", "log2", "log10", "log1p", "sqrt", "pow", "floor", "ceil", "tanh", "fabs")

FUNCTIONS: frozenset[str] = frozenset(
    (
        *(f"torch.{name}" for name in (*_ELEMENTWISE, *_REDUCTIONS, *_SHAPES, *_MADE, *_SEVERAL) if name != "rsub"),
        *(f"torch.nn.functional.{name}" for name in _NN),
        *(f"operator.{name}" for name in _OPERATORS),
        *(f"math.{name}" for name in _MATH),
        *_AS_TORCH_FX_CALLS_THEM,
    )
)
METHODS: frozenset[str] = frozenset(
    name
    for name in (
        *_ELEMENTWISE,
        *_REDUCTIONS,
        *_SHAPES,
        "view",
        "expand",
        "expand_as",
        "view_as",
        "float",
        "bool",
        "int",
    )
    if name not in ("where", "rsub", "isclose", "lerp", "log_softmax", "broadcast_to")
) | frozenset(("log_softmax", "broadcast_to", "where", "lerp", "size", "dim", "numel", "type_as", "to"))
ATTRIBUTES: frozenset[str] = frozenset(("shape", "ndim"))
DTYPES: frozenset[str] = frozenset(("float32", "float", "int64", "long", "bool"))


_ALLOWED = (
    "a loss on the server may call (docs/losses.md); forward_backward_custom takes the Python function itself as well, "
    "and computes that in the client"
)


class LossInput(msgspec.Struct, frozen=True):
    """`rank` 0 is a scalar, 1 is [T], 2 is [T, K]."""

    name: str
    rank: Rank


class LossNode(msgspec.Struct, frozen=True):
    """`args` and `kwargs` as the SDK encodes them: plain values, and {"ref": name}, {"tuple": [...]}, {"dict": {...}},
    {"slice": [start, stop, step]}, {"ellipsis": true}, {"float": "inf"}, {"dtype": name} for what is none."""

    op: Literal["placeholder", "call_function", "call_method", "output"]
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class CustomLoss(msgspec.Struct, frozen=True):
    """From one datum's `logprobs`, in the shape of its targets, and those of its `loss_fn_inputs` that are named, to a
    scalar and scalar metrics. `inputs` are in order, `logprobs` first."""

    name: str
    inputs: list[LossInput]
    nodes: list[LossNode]

    @property
    def names(self) -> list[str]:
        """Of the `loss_fn_inputs` that it reads."""
        return [each.name for each in self.inputs[1:]]


def check_custom_loss(loss: CustomLoss) -> None:
    """Raises InvalidRequestError naming the node. What its operations make of their arguments is the actor's to say."""
    _check_inputs(loss.inputs)
    if not 2 <= len(loss.nodes) <= NODES_AT_MOST:
        raise InvalidRequestError.of("graph.nodes", len(loss.nodes), f"2 to {NODES_AT_MOST} of them")
    known: set[str] = set()
    placeholders = [node.target for node in loss.nodes if node.op == "placeholder"]
    if placeholders != [each.name for each in loss.inputs]:
        raise InvalidRequestError.of("graph.nodes", placeholders, "one placeholder for each input, in their order")
    for i, node in enumerate(loss.nodes):
        where = f"graph.nodes[{i}]"
        if (node.op == "output") != (i == len(loss.nodes) - 1):
            raise InvalidRequestError.of(f"{where}.op", node.op, "output at the end, and nowhere else")
        if node.name in known:
            raise InvalidRequestError.of(f"{where}.name", node.name, "a name that no node before has")
        _check_target(where, node)
        for ref in _refs(where, [*node.args, *node.kwargs.values()], 0):
            if ref not in known:
                raise InvalidRequestError.of(f"{where}.args", ref, "the name of a node before it")
        known.add(node.name)
    _check_output(loss.nodes[-1])


def _check_inputs(inputs: list[LossInput]) -> None:
    if not 1 <= len(inputs) <= INPUTS_AT_MOST:
        raise InvalidRequestError.of("inputs", len(inputs), f"1 to {INPUTS_AT_MOST} of them")
    if (inputs[0].name, inputs[0].rank) not in (("logprobs", 1), ("logprobs", 2)):
        raise InvalidRequestError.of("inputs[0]", inputs[0].name, "logprobs, of rank 1 or 2")
    for i, each in enumerate(inputs):
        if not INPUT_NAME.fullmatch(each.name) or each.name in (before.name for before in inputs[:i]):
            raise InvalidRequestError.of(f"inputs[{i}].name", each.name, "a lowercase name that no other input has")


def _check_target(where: str, node: LossNode) -> None:
    named = f"{where}.target"
    if node.op == "call_function" and node.target not in FUNCTIONS:
        raise InvalidRequestError.of(named, node.target, f"a function that {_ALLOWED}")
    if node.op == "call_method" and node.target not in METHODS:
        raise InvalidRequestError.of(named, node.target, f"a method that {_ALLOWED}")
    if node.target == "getattr" and node.args[1:] not in [[each] for each in ATTRIBUTES]:
        raise InvalidRequestError.of(f"{where}.args", node.args[1:], f"one of {', '.join(sorted(ATTRIBUTES))}")
    if len(node.args) + len(node.kwargs) > ARGUMENTS_AT_MOST:
        raise InvalidRequestError.of(f"{where}.args", len(node.args), f"at most {ARGUMENTS_AT_MOST} arguments")


def _check_output(node: LossNode) -> None:
    where = "graph's output"
    match node.args:
        case [{"tuple": [{"ref": str()}, {"dict": dict() as metrics}]}]:
            pass
        case [[{"ref": str()}, {"dict": dict() as metrics}]]:
            pass
        case _:
            raise InvalidRequestError.of(where, node.args, "(loss, metrics), the loss made by a node")
    for key, value in metrics.items():  # pyright: ignore[reportUnknownVariableType]
        if not (isinstance(key, str) and METRIC_NAME.fullmatch(key)):
            raise InvalidRequestError.of(where, key, "metrics named custom/NAME:sum or custom/NAME:mean")
        if not (isinstance(value, dict) and set(value) == {"ref"}):  # pyright: ignore[reportUnknownArgumentType]
            raise InvalidRequestError.of(where, value, f"{key} made by a node")


def output_of(loss: CustomLoss) -> tuple[str, dict[str, str]]:
    """The node that is the loss, and those that are metrics; of one that was checked."""
    (value,) = loss.nodes[-1].args
    scalar, metrics = value["tuple"] if isinstance(value, dict) else value
    return scalar["ref"], {key: each["ref"] for key, each in metrics["dict"].items()}


def _refs(where: str, values: Sequence[Any], depth: int) -> Iterator[str]:
    """All that is referred to. Raises InvalidRequestError for what is no value."""
    if depth > _DEPTH_AT_MOST or len(values) > ARGUMENTS_AT_MOST:
        problem = f"at most {_DEPTH_AT_MOST} lists in each other, of {ARGUMENTS_AT_MOST} values"
        raise InvalidRequestError.of(f"{where}.args", len(values), problem)
    for value in values:
        match value:
            case None | bool() | int() | float() | str():
                pass
            case list():
                yield from _refs(where, value, depth + 1)  # pyright: ignore[reportUnknownArgumentType]
            case {"ref": str() as name, **rest} if not rest:
                yield name
            case {"tuple": list() as inner, **rest} if not rest:
                yield from _refs(where, inner, depth + 1)  # pyright: ignore[reportUnknownArgumentType]
            case {"dict": dict() as inner, **rest} if not rest:
                yield from _refs(where, list(inner.values()), depth + 1)  # pyright: ignore[reportUnknownArgumentType]
            case {"slice": [_, _, _] as inner, **rest} if not rest:
                yield from _refs(where, inner, depth + 1)  # pyright: ignore[reportUnknownArgumentType]
            case {"ellipsis": True, **rest} if not rest:
                pass
            case {"float": "inf" | "-inf" | "nan", **rest} if not rest:
                pass
            case {"dtype": str() as dtype, **rest} if not rest and dtype in DTYPES:
                pass
            case _:
                raise InvalidRequestError.of(f"{where}.args", value, "values and dtypes that custom losses have here")
