"""The decoder of a base model through `torch.compile`, for steps of the decode loop: one graph, made at the start.

It knows no rows and no adapters: those are behind the operators that the graph calls.
"""

import torch
from torch import Tensor
from torch._dynamo.decorators import mark_dynamic

from ...wire.errors import UnsupportedModelError
from ..model.agreement import agree
from ..model.base_model import BaseModel
from ..model.graphs import COMPILER_ERRORS, cannot_be_compiled, graph
from ..model.survey import standing_in

_SEVERAL = 3
"""Tokens of the run that the graph is made in. The graph is for any number from 2 on: a shape of one is a case of its
own to a compiler."""


class CompiledModel:
    """Takes from seconds to a minute to make. Raises UnsupportedModelError where the model cannot be compiled, no
    compiler is found, or the graph computes something else than the model."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._run = graph(self._decode, base.dtype)
        self._name = f"{type(base.model).__name__} {base.in_flight.number}"
        self._check(torch.arange(_SEVERAL, device=base.device))

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `BaseModel.hidden_states` without a gradient; cache and linears must be in flight."""
        if len(tokens) < 2:
            return self._base.hidden_states(tokens, positions, grad=False)
        return self._run(self._name, tokens, positions)

    def _decode(self, name: str, tokens: Tensor, positions: Tensor) -> Tensor:
        assert name == self._name, "graphs of several models are told apart by it"
        return self._base.run_decoder(tokens, positions)

    @torch.inference_mode()
    def _check(self, tokens: Tensor) -> None:
        name = type(self._base.model).__name__
        inputs = tokens, tokens.clone()
        with standing_in(self._base):
            expected = self._base.hidden_states(*inputs, grad=False)
            for tensor in inputs:
                mark_dynamic(tensor, 0)
            try:
                found = self._run(self._name, *inputs)
            except COMPILER_ERRORS as error:
                raise cannot_be_compiled(name, error) from error
        if not agree(found, expected):
            raise UnsupportedModelError(f"{name} computes something else when it is compiled, run it without")
