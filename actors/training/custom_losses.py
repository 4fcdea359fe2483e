"""Users' losses, executed: each operation is looked up in a list, its result's size is known before it is computed, and
nothing else of a graph is believed."""

import builtins
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional
from torch import Tensor

from ...wire.custom_loss import DTYPES, FUNCTIONS, METHODS, CustomLoss, LossNode, output_of
from ...wire.errors import InvalidRequestError

ELEMENTS_AT_MOST = 1 << 24
"""That all of a graph's results may have for one datum together: they are held until the gradient is known."""
_LARGEST = 1 << 62

Shapes: TypeAlias = Sequence[tuple[int, ...]]


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    modules: dict[str, Any] = {
        "": builtins,
        "torch": torch,
        "torch._C._nn": inspect.getmodule(torch.nn.functional.softplus),
        "torch.functional": torch.functional,
        "torch.nn.functional": torch.nn.functional,
        "operator": operator,
        "math": math,
    }
    return getattr(modules[module], function)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {name: _function(name) for name in FUNCTIONS}
_METHODS: Mapping[str, Callable[..., Any]] = {name: getattr(Tensor, name) for name in METHODS}
_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True, slots=True)
class Evaluated:
    """`grad` is d loss / d logprobs, in their shape."""

    loss: float
    grad: Tensor
    metrics: dict[str, float]


def check_shapes(where: str, loss: CustomLoss, shapes: Shapes, dtypes: Sequence[torch.dtype]) -> None:
    """Whether the graph can be executed on inputs of these shapes, `logprobs` first, and what it would take: nothing is
    computed. Raises InvalidRequestError."""
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True)]
    found = _run(where, loss, tensors, bounded=True)
    scalar, metrics = output_of(loss)
    for name, node in (("its loss", scalar), *((f"metric {key}", each) for key, each in metrics.items())):
        value = found[node]
        if not isinstance(value, Tensor) or value.ndim or (node == scalar and not value.is_floating_point()):
            shown = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidRequestError.of(f"{where}: {name} of {loss.name}", shown, "a tensor without dimensions")


def evaluate_custom(where: str, loss: CustomLoss, logprobs: Tensor, inputs: Sequence[Tensor]) -> Evaluated:
    """On `logprobs` in the shape of the datum's targets; after `check_shapes`. Raises InvalidRequestError for what the
    values make of it."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logprobs.detach().clone().requires_grad_()
        found = _run(where, loss, [leaf, *(each.clone() for each in inputs)], bounded=False)
        scalar, metrics = output_of(loss)
        total: Tensor = found[scalar]
        grad = _gradient(where, loss, total, leaf) if total.requires_grad else None
    told = {key: float(found[node].detach()) for key, node in metrics.items()}
    return Evaluated(float(total.detach()), torch.zeros_like(leaf) if grad is None else grad, told)


def _gradient(where: str, loss: CustomLoss, total: Tensor, leaf: Tensor) -> Tensor | None:
    try:
        return torch.autograd.grad(total, leaf, allow_unused=True)[0]
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequestError(f"{where}: the gradient of {loss.name}: {reason}", field="loss_fn") from None


def _run(where: str, loss: CustomLoss, inputs: Sequence[Tensor], *, bounded: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given, elements = iter(inputs), 0
    for node in loss.nodes[:-1]:
        if node.op == "placeholder":
            found[node.name] = next(given)
            continue
        value = _computed(where, node, found)
        found[node.name] = value
        if bounded:
            elements += _elements(value)
            if elements > ELEMENTS_AT_MOST:
                problem = f"results of {ELEMENTS_AT_MOST:,} elements in all, up to node {node.name} ({node.target})"
                raise InvalidRequestError.of(f"{where}: {loss.name}", f"{elements:,} elements", f"at most {problem}")
    return found


def _computed(where: str, node: LossNode, found: Mapping[str, Any]) -> Any:
    args = [_value(each, found) for each in node.args]
    kwargs = {key: _value(each, found) for key, each in node.kwargs.items()}
    call = _FUNCTIONS[node.target] if node.op == "call_function" else _METHODS[node.target]
    _check_arguments(where, node, args, kwargs)
    try:
        with warnings.catch_warnings(action="ignore"):  # they are for who wrote the loss, who is not here
            return call(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequestError(f"{where}: {node.target} of node {node.name}: {reason}", field="loss_fn") from None


def _check_arguments(where: str, node: LossNode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What a list of names cannot say: no value decides over a size, no method is that of another thing, and no number
    grows without end."""
    name = node.target.rpartition(".")[2]
    mistake = None
    if node.op == "call_method" and not (args and isinstance(args[0], Tensor)):
        mistake = "a tensor's method"
    elif node.target == "getattr" and not isinstance(args[0], Tensor):
        mistake = "an attribute of a tensor"
    elif name == "to" and not isinstance([*args[1:], None][0], torch.dtype | Tensor):
        mistake = "a dtype or a tensor to be like"
    elif node.target.startswith(("operator.", "math.")) and any(isinstance(each, str) for each in args):
        mistake = "numbers and tensors"
    elif name == "getitem" and not _is_plain_index(args[1:]):
        mistake = "numbers, slices, None and ... as an index: no tensors"
    elif name == "where" and sum(isinstance(each, Tensor) for each in [*args, *kwargs.values()]) and len(args) < 3:
        mistake = "a condition and two values"
    elif {"out", "generator", "device", "inplace", "non_blocking"} & kwargs.keys():
        mistake = "none of out, generator, device, inplace, non_blocking"
    elif any(isinstance(each, int) and abs(each) > _LARGEST for each in args):
        mistake = f"whole numbers up to {_LARGEST}"
    elif node.target.startswith("operator.") and name in ("pow", "mul") and not _has_tensor(args):
        mistake = _growing(name, args)
    if mistake is not None:
        raise InvalidRequestError(f"{where}: {node.target} of node {node.name}: expected {mistake}", field="loss_fn")


def _growing(name: str, args: Sequence[Any]) -> str | None:
    """Of numbers and lists, which are no tensors."""
    if not all(isinstance(each, int | float) for each in args):
        return "numbers or tensors"
    if name == "pow" and any(abs(each) > 1024 for each in args):
        return "numbers up to 1024, where there is no tensor"
    return None


def _has_tensor(args: Sequence[Any]) -> bool:
    return any(isinstance(each, Tensor) for each in args)


def _is_plain_index(args: Sequence[Any]) -> bool:
    if len(args) != 1:
        return False
    parts = args[0] if isinstance(args[0], tuple) else (args[0],)
    return all(part is None or part is ... or isinstance(part, int | slice) for part in parts)


def _value(value: Any, found: Mapping[str, Any]) -> Any:
    """What was checked to be one."""
    match value:
        case {"ref": name}:
            return found[name]
        case {"tuple": inner}:
            return tuple(_value(each, found) for each in inner)
        case {"dict": inner}:
            return {key: _value(each, found) for key, each in inner.items()}
        case {"slice": [start, stop, step]}:
            return slice(*(_value(each, found) for each in (start, stop, step)))
        case {"ellipsis": _}:
            return ...
        case {"float": number}:
            return float(number)
        case {"dtype": name}:
            return _DTYPES[name]
        case list():
            return [_value(each, found) for each in value]
        case _:
            return value


def _elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, tuple | list):
        return sum(_elements(each) for each in value)
    return 1
