"""The batch in flight: what attention and LoRA layers read instead of ten extra arguments.

One object per loaded model, owned by the engine; it is filled before a forward and never read across two batches. A
batch of training can be set aside between two of its products, for others to run theirs.
"""

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

    from .adapter import Adapter


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `end` of the packed row belong to `adapter`. Tokens in no segment see the bare base model."""

    adapter: "Adapter"
    start: int
    end: int


class AttentionCache(Protocol):
    """Keys and values of sequences that are being decoded; attention hands it what is new and gets its output."""

    def attend(
        self,
        layer: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
        sliding_window: int | None,
        sinks: "torch.Tensor | None",
    ) -> "torch.Tensor":
        """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, heads, tokens, dim]."""
        ...


class LinearLayer(Protocol):
    """One trainable linear layer of the base model."""

    bias: "torch.Tensor | None"
    out_features: int
    is_quantised: bool

    @property
    def weight(self) -> "torch.Tensor":
        """[outputs, inputs]"""
        ...


class Linears(Protocol):
    """Takes the trainable linear layers over, in inference."""

    def linear(self, index: int, x: "torch.Tensor") -> "torch.Tensor":
        """Of the layer at that place in model order, adapters included: x [..., inputs] with the packed row's tokens in
        its leading axes -> [..., outputs]."""
        ...

    def experts(
        self, index: int, hidden: "torch.Tensor", chosen: "torch.Tensor", counted: "torch.Tensor"
    ) -> "torch.Tensor":
        """Of the routed experts whose first weight has that place in model order, adapters included: hidden [tokens,
        hidden], chosen and counted [tokens, choices] -> [tokens, hidden]."""
        ...


class DecoderLayers(Protocol):
    """Takes the layers of the decoder over, in training. Layers have places, in model order; the trainable linear
    layers in one have roles, in its order."""

    @property
    def place(self) -> "torch.Tensor":
        """[] int64 on the host: of the layer that is under way."""
        ...

    @property
    def roles(self) -> Mapping[int, int]:
        """Of linear layers, by their places in the model."""
        ...

    def run(self, place: int, options: dict[str, Any], hidden: "torch.Tensor", *args: Any) -> Any:
        """What the layer makes of hidden [1, tokens, hidden]."""
        ...

    def let_go(self) -> None:
        """Of what a backward would still want."""
        ...

    def linear(self, place: int, role: int, x: "torch.Tensor") -> "torch.Tensor":
        """x [..., inputs] -> [..., outputs], adapters included."""
        ...

    def linear_backward(self, place: int, role: int, dy: "torch.Tensor", x: "torch.Tensor") -> "torch.Tensor":
        """The gradient of x; adapters' are added to."""
        ...

    def attend(
        self,
        place: int,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        scaling: float,
        sliding_window: int | None,
        sinks: "torch.Tensor | None",
    ) -> "torch.Tensor":
        """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] -> [1, tokens, heads, dim]."""
        ...

    def attend_backward(self, place: int, dy: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """The gradients of query, key and value."""
        ...

    def experts(
        self, place: int, hidden: "torch.Tensor", chosen: "torch.Tensor", counted: "torch.Tensor"
    ) -> "torch.Tensor":
        """As `Linears.experts`."""
        ...

    def experts_backward(self, place: int, dy: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """The gradients of `hidden` and `counted`; adapters' are added to."""
        ...


def _nothing() -> None:
    pass


def _wait_for(pixels: "Future[Any]") -> None:
    pixels.exception()


_numbers = itertools.count()
_all: "WeakValueDictionary[int, InFlight]" = WeakValueDictionary()


@dataclass(slots=True, weakref_slot=True, eq=False)
class InFlight:
    """`lengths` are those of the sequences laid end to end in the packed row, in order. Where `linears` is there, it
    computes the trainable layers in inference; where `layers` is, it computes the decoder's in training.

    `again` layers, the first, keep their input alone for the backward, which computes them again.

    `on_pause` is called between the products of a training pass, forward and backward: whoever wants the device may use
    it there, after `set_aside`; `after_pause`, where several devices share the model, when training goes on; and
    `wait_for`, with what it waits for, where training has nothing to compute.
    `beside_others` says that somebody does, so that products are to be short. `number` is the model's, unlike any
    other's in the process."""

    lengths: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    cache: AttentionCache | None = None
    linears: Linears | None = None
    layers: DecoderLayers | None = None
    again: int = 0
    on_pause: Callable[[], None] = _nothing
    after_pause: Callable[[], None] | None = None
    wait_for: "Callable[[Future[Any]], None]" = _wait_for
    beside_others: bool = False
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        _all[self.number] = self

    @staticmethod
    def of(number: int) -> "InFlight":
        """Raises KeyError where nobody holds it any longer."""
        return _all[number]

    def pause(self) -> None:
        self.on_pause()
        if self.after_pause is not None:
            self.after_pause()

    @contextmanager
    def set_aside(self) -> Generator[None]:
        """Other batches may be in flight inside."""
        lengths, segments = self.lengths, self.segments
        try:
            yield
        finally:
            self.lengths, self.segments = lengths, segments
