"""Graphs by `torch.compile`, each made once, when an actor starts."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from ...wire.errors import UnsupportedModelError

P = ParamSpec("P")
R = TypeVar("R")

COMPILER_ERRORS = (TorchDynamoException, InductorError)


def graph(function: Callable[P, R], dtype: torch.dtype) -> Callable[P, R]:
    """`function`, whose argument `name` tells graphs apart: for one name it is compiled once, in the call that comes
    first, and nothing else that such a graph depends on may change from call to call. `dtype` is the model's."""
    options: dict[str, Any] = {
        "guard_filter_fn": _keep_the_name,
        "compile_threads": 1,
        # What is fused would keep float32 where the model rounds to its own dtype, and so would not be its own.
        "emulate_precision_casts": dtype != torch.float32,
    }
    return torch.compile(function, fullgraph=True, options=options)


def cannot_be_compiled(name: str, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} cannot be compiled, run it without: {str(error).strip().splitlines()[0]}")


def _keep_the_name(guards: Sequence[Any]) -> list[bool]:
    return [guard.name == "name" for guard in guards]
