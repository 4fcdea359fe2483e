"""The trainable layers in inference: the base's products and what the adapters of a step add to them.

Layers that read one tensor, as the projections to queries, keys and values do, are computed together when the first of
them is called. It knows no sequences; whose row is whose is told before a step.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.adapter import Adapter
from ..model.base_model import BaseModel
from ..model.in_flight import LinearLayer, Segment
from ..model.lora import experts_of, layers_of
from ..model.products import linear_float32, pack
from .lora.gathered import Gathered
from .lora.native import NativeRows, NativeWalked
from .lora.walked import Walked


class BaseProducts:
    """`groups` are the layers that read one tensor, in the order in which they do.

    Where weights can be packed they are, once more beside the plain ones that training reads; what is quantised is not,
    which would be packed expanded. The output `head`'s
    products are in float32 always, as the trainer's are.
    """

    def __init__(self, groups: Sequence[Sequence[LinearLayer]], head: object = None) -> None:
        self._groups, self._head = groups, head
        self._packed = [
            None if any(m.is_quantised for m in group) else pack([m.weight for m in group], [m.bias for m in group])
            for group in groups
        ]
        self._sizes = [[m.out_features for m in group] for group in groups]

    def products(self, group: int, x: Tensor) -> Sequence[Tensor]:
        """Of every layer of the group: x [rows, inputs] -> [rows, outputs], which may be views of one tensor."""
        packed, sizes = self._packed[group], self._sizes[group]
        if packed is None:
            return [self._product(module, x) for module in self._groups[group]]
        y = packed.linear(x)
        return (y,) if len(sizes) == 1 else y.split_with_sizes(sizes, -1)

    def _product(self, module: LinearLayer, x: Tensor) -> Tensor:
        return (linear_float32 if module is self._head else F.linear)(x, module.weight, module.bias)


class RowAdapters(Protocol):
    """Adds what the adapters have to the packed row's first rows: `Gathered` does, and `NativeRows`."""

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int], device: torch.device) -> bool:
        """The packed row will begin with `counts[i]` rows of `adapters[i]`, at least one each, all different.

        Returns whether it is worth it. If so they are held, and must not change until `clear` or another `arrange`.
        """
        ...

    def add(self, group: int, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Adds scale (x A.T) B to the outputs of the group's layers, [tokens, outputs] each, in place.

        x [tokens, inputs].
        """
        ...

    def clear(self) -> None: ...


class DecodeLinears:
    """While `gathering`, the packed row begins with the rows that were arranged, and `beside` are the segments behind
    them; otherwise those in flight are walked.

    `native`: by the kernel that `lora.kernel` loads.
    """

    def __init__(self, base: BaseModel, groups: Sequence[tuple[int, ...]], *, native: bool) -> None:
        self.gathering = False
        self.beside: Sequence[Segment] = ()
        self._in_flight = base.in_flight
        self._experts = experts_of(base)
        modules = layers_of(base)
        head = base.model.get_output_embeddings()
        self._products = BaseProducts([[modules[index] for index in group] for group in groups], head)
        self._rows: RowAdapters = NativeRows(groups) if native else Gathered(groups)
        self._walked = NativeWalked(groups) if native else Walked(groups)
        self._place = {module: (g, i, len(group)) for g, group in enumerate(groups) for i, module in enumerate(group)}
        self._computed: dict[int, dict[int, Tensor]] = {}  # by group: what its layers have not been asked for yet

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int], device: torch.device) -> bool:
        """As `RowAdapters.arrange`: `gathering` may be set if it says so, and otherwise the rows are to be walked."""
        return self._rows.arrange(adapters, counts, device)

    def retain(self, adapters: Collection[Adapter]) -> None:
        """No others will come in the next step; what was copied of them goes."""
        self._walked.retain(adapters)
        if not adapters:
            self._rows.clear()

    def forget(self) -> None:
        """A step is over, or was broken off."""
        self._computed.clear()

    def linear(self, index: int, x: Tensor) -> Tensor:
        """x [..., inputs] with the packed row's tokens in its leading axes -> [..., outputs].

        Layers of a group may be asked in any order, each once, before the first is asked again.
        """
        group, i, size = self._place[index]
        if size == 1:
            y = self._compute(group, x)[0]
        else:
            if group not in self._computed:
                self._computed[group] = dict(enumerate(self._compute(group, x)))
            y = self._computed[group].pop(i)
            if not self._computed[group]:
                del self._computed[group]
        return y.view(*x.shape[:-1], y.shape[-1])

    def experts(self, index: int, hidden: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        """Of the layer whose first weight has that place in model order, with the adapters of `in_flight.segments`:
        hidden [tokens, hidden], chosen and counted [tokens, choices] -> [tokens, hidden]."""
        return self._experts[index].compute(hidden, chosen, counted)

    def _compute(self, group: int, x: Tensor) -> Sequence[Tensor]:
        rows = x.view(-1, x.shape[-1])  # [tokens, inputs]
        outputs = self._products.products(group, rows)  # [tokens, outputs] each
        segments = self._in_flight.segments
        if self.gathering:
            self._rows.add(group, rows, outputs)
            segments = self.beside
        if segments:
            self._walked.add(group, segments, rows, outputs)
        return outputs
