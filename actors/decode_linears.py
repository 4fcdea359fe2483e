"""The trainable layers in inference: the base's products and what the adapters of a step add to them.

Layers that read one tensor, as the projections to queries, keys and values do, are computed together when the first of
them is called. It knows no sequences; whose row is whose is told before a step.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import Adapter
from .base_model import BaseModel
from .in_flight import LinearLayer
from .lora import LoraLinear
from .lora_decode import Gathered
from .lora_walk import Walked
from .products import Packed, pack


class BaseProducts:
    """`groups` are the indices of `modules` that read one tensor, in the order in which they do.

    Where weights can be packed they are, once more beside the plain ones that training reads.
    """

    def __init__(self, modules: Sequence[LinearLayer], groups: Sequence[tuple[int, ...]]) -> None:
        by_index = {module.index: module for module in modules}
        self._packed: list[Packed | None] = []
        self._sizes: list[list[int]] = []
        for group in groups:
            members = [by_index[index] for index in group]
            self._packed.append(pack([m.weight for m in members], [m.bias for m in members]))
            self._sizes.append([len(m.weight) for m in members])
        self._outputs: Sequence[Tensor] = ()

    def product(self, group: int, i: int, module: LinearLayer, x: Tensor) -> Tensor:
        """Of the group's i-th module, whose neighbours read the same x [rows, inputs] -> [rows, outputs]."""
        packed = self._packed[group]
        if packed is None:
            return F.linear(x, module.weight, module.bias)
        if i == 0:
            y = packed.linear(x)
            self._outputs = (y,) if len(self._sizes[group]) == 1 else y.split_with_sizes(self._sizes[group], -1)
        return self._outputs[i]

    def forget(self) -> None:
        self._outputs = ()


class DecodeLinears:
    """Where rows are gathered, the packed row begins with them. What else has an adapter is in `in_flight.segments`."""

    def __init__(self, base: BaseModel, groups: Sequence[tuple[int, ...]]) -> None:
        self.gathering = False
        self._in_flight = base.in_flight
        self._products = BaseProducts([m for m in base.model.modules() if isinstance(m, LoraLinear)], groups)
        self._gathered, self._walked = Gathered(groups), Walked(groups)
        self._place = {module: (g, i) for g, group in enumerate(groups) for i, module in enumerate(group)}

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int], device: torch.device) -> bool:
        """The packed row will begin with `counts[i]` rows of `adapters[i]`, at least one each, all different.

        Returns whether gathering is worth it: `gathering` may be set then. Where it is not, they are segments too.
        """
        return self._gathered.arrange(adapters, counts, device)

    def retain(self, adapters: Collection[Adapter]) -> None:
        """No others will come in the next step; what was copied of them goes."""
        self._walked.retain(adapters)
        if not adapters:
            self._gathered.clear()

    def forget_inputs(self) -> None:
        """A step is over."""
        self._products.forget()
        self._gathered.forget_input()
        self._walked.forget_input()

    def linear(self, module: LinearLayer, x: Tensor) -> Tensor:
        """x [..., inputs] with the packed row's tokens in its leading axes -> [..., outputs]."""
        group, i = self._place[module.index]
        rows = x.view(-1, module.in_features)  # [tokens, inputs]
        y = self._products.product(group, i, module, rows)  # [tokens, outputs]
        if self.gathering:
            self._gathered.add(group, i, rows, y)
        if self._in_flight.segments:
            self._walked.add(group, i, self._in_flight.segments, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])
