"""The decoder's layers through `torch.compile`, for training passes: one graph forward and one back for each kind of
layer, in which all that lies between products is a few kernels that keep less than the model's own.

Products, attention and experts are behind operators, so that a graph knows no rows, no adapters and no pauses.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.decorators import mark_dynamic
from torch._functorch import config as functorch
from torch.utils._pytree import tree_leaves

from ...wire.errors import UnsupportedModelError
from ..model.agreement import agree
from ..model.attention import attend_sequences
from ..model.base_model import BaseModel
from ..model.experts import RoutedExperts
from ..model.graphs import cannot_be_compiled, graph
from ..model.in_flight import InFlight, Segment
from ..model.lora import Layout, LoraLinear, LoraTargets
from ..model.recomputing import decoder_layers
from .pass_cost import adapter_on_all

_TOKENS = (37, 24)
"""Of the rows that graphs are made with: together a prime, which no other size of a model is likely to be."""
_KEEP_LESS = {"ban_recompute_materialized_backward": False, "ban_recompute_used_far_apart": False}
"""What lies between products is computed again in the backward rather than kept, be it for a product or for later."""
_PLACES = frozenset(("index", "layer_idx", "layer_id", "layer_number"))
"""What layers of one kind may differ in, beside their weights. Graphs know none of them."""


@dataclass(frozen=True, slots=True)
class _Layer:
    module: nn.Module
    forward: Callable[..., Any]
    linears: list[LoraLinear]
    experts: RoutedExperts | None
    graph: str
    """Its name, which is that of the kind."""


@dataclass(slots=True)
class _Kept:
    """For the backward of one layer."""

    downs: dict[int, tuple[Layout, list[Tensor | None]]] = field(default_factory=dict)
    attention: tuple[list[Tensor], Tensor] | None = None
    experts: tuple[list[Tensor], Tensor] | None = None


class CompiledLayers:
    """Takes from seconds to a minute to make. Raises UnsupportedModelError where a layer cannot be compiled, or the
    graphs compute something else than the model."""

    def __init__(self, base: BaseModel, targets: LoraTargets) -> None:
        self._in_flight = base.in_flight
        self.roles: Mapping[int, int] = {}
        self._layers = list(_layers_of(base))
        for layer in self._layers:
            self.roles |= {linear.index: role for role, linear in enumerate(layer.linears)}
        self._widest = max(max(x.in_features, x.out_features) for layer in self._layers for x in layer.linears)
        self._places = [torch.tensor(place) for place in range(len(self._layers))]
        self.place = self._places[0]
        self._keeps = True
        self._kept = [_Kept() for _ in self._layers]
        self._run = graph(_run_layer, base.dtype)
        self._is_made = False
        self._check(base, targets)

    def run(self, place: int, options: dict[str, Any], hidden: Tensor, *args: Any) -> Any:
        layer = self._layers[place]
        tokens = hidden.shape[1]
        # A shape of one is a case of its own to a compiler; and its kernels for a GPU count in 32 bits.
        if tokens < 2 or tokens * self._widest >= 2**31 or args:
            return layer.forward(hidden, *args, **options)
        # Where it is computed again in the backward, the first time keeps nothing.
        self._keeps = torch.is_grad_enabled()
        self.place = self._places[place]
        if not self._is_made:
            _mark_tokens((hidden, options), tokens)
        return self._run(layer.graph, layer.module, hidden, options)

    def let_go(self) -> None:
        self._kept = [_Kept() for _ in self._layers]

    def linear(self, place: int, role: int, x: Tensor) -> Tensor:
        linear, rows = self._layers[place].linears[role], x.reshape(-1, x.shape[-1])
        self._in_flight.pause()
        layout = linear.layout(len(rows))
        y, downs = linear.apply_to(rows, layout)
        if self._keeps:
            self._kept[place].downs[role] = layout, downs
        return y.view(*x.shape[:-1], -1)

    def linear_backward(self, place: int, role: int, dy: Tensor, x: Tensor) -> Tensor:
        self._in_flight.pause()
        layout, downs = self._kept[place].downs.pop(role)
        rows, d_rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, dy))
        return self._layers[place].linears[role].backward_of(d_rows, rows, layout, downs).view(x.shape)

    def attend(
        self,
        place: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding_window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_sequences(q, k, v, self._in_flight.lengths, scaling, sliding_window, sinks)

        record = self._recorded(attend, query, key, value)
        if self._keeps:
            self._kept[place].attention = record
        return _of_its_own(record[1])

    def attend_backward(self, place: int, dy: Tensor) -> tuple[Tensor, ...]:
        record, self._kept[place].attention = self._kept[place].attention, None
        return _gradients(record, dy)

    def experts(self, place: int, hidden: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        experts = self._layers[place].experts
        assert experts is not None

        def compute(hidden: Tensor, counted: Tensor) -> Tensor:
            return experts.compute(hidden, chosen, counted)

        record = self._recorded(compute, hidden, counted)
        if self._keeps:
            self._kept[place].experts = record
        return _of_its_own(record[1])

    def experts_backward(self, place: int, dy: Tensor) -> tuple[Tensor, ...]:
        record, self._kept[place].experts = self._kept[place].experts, None
        return _gradients(record, dy)

    def _recorded(self, compute: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """By autograd, of copies: a graph uses the memory of its own tensors again."""
        if not self._keeps:
            return [], compute(*inputs)
        with _autograd(), torch.enable_grad():
            copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]
            return copies, compute(*copies)

    def _check(self, base: BaseModel, targets: LoraTargets) -> None:
        name, kinds = type(base.model).__name__, len({layer.graph for layer in self._layers})
        expected = _try(base, targets, None)
        try:
            with functorch.patch(_KEEP_LESS), dynamo.patch(recompile_limit=8 + kinds), warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"The \.grad attribute")  # which the compiler itself looks at
                found = _try(base, targets, self)
        except Exception as error:  # of a compiler, or of a layer that calls an operator as none here does
            raise cannot_be_compiled(name, error) from error
        self._is_made = True
        if not all(agree(one, other) for one, other in zip(found, expected, strict=True)):
            raise UnsupportedModelError(f"{name} computes something else when its layers are compiled, run it without")


def _run_layer(name: str, layer: nn.Module, hidden: Tensor, options: dict[str, Any]) -> Any:
    assert name, "what is not read is not guarded, and the graphs of all kinds would be one"
    return type(layer).forward(layer, hidden, **options)


def _layers_of(base: BaseModel) -> Iterator[_Layer]:
    kinds = dict[str, int]()
    for module in decoder_layers(base.model):
        linears = [part for part in module.modules() if isinstance(part, LoraLinear)]
        mixtures = [getattr(part, "lorry", None) for part in module.modules()]
        experts = next((mixture for mixture in mixtures if isinstance(mixture, RoutedExperts)), None)
        number = kinds.setdefault(_kind_of(module), len(kinds))
        name = f"{type(base.model).__name__} {base.in_flight.number}, layers {number}"
        yield _Layer(module, type(module).forward.__get__(module), linears, experts, name)


def _kind_of(layer: nn.Module) -> str:
    """What a graph of it may depend on."""
    found = list[object]()
    for name, module in layer.named_modules():
        plain = (bool, int, float, str, type(None))
        constants = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in _PLACES}
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors]
        found.append((name, type(module).__qualname__, sorted(constants.items()), shapes))
    return repr(found)


def _try(base: BaseModel, targets: LoraTargets, layers: CompiledLayers | None) -> list[Tensor]:
    """Hidden states, and the gradient of an adapter on the first of two rows."""
    in_flight: InFlight = base.in_flight
    adapter = adapter_on_all(base, targets, 1)
    weights = torch.Generator().manual_seed(0)
    adapter.weights.copy_(torch.randn(adapter.size, generator=weights) * 0.02)
    adapter.refresh()
    places = torch.cat([torch.arange(length) for length in _TOKENS]).to(base.device)
    in_flight.lengths, in_flight.segments = list(_TOKENS), [Segment(adapter, 0, _TOKENS[0])]
    in_flight.layers, former = layers, in_flight.layers
    try:
        hidden = base.hidden_states(places * 7 % base.vocab_size, places, grad=True)
        hidden.backward(torch.randn(hidden.shape, generator=weights).to(hidden))
        return [hidden.detach(), adapter.grad]
    finally:
        in_flight.lengths, in_flight.segments, in_flight.layers = [], [], former
        if layers is not None:
            layers.let_go()


def _mark_tokens(values: Any, tokens: int) -> None:
    """Graphs are for any number of them."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                if size == tokens:
                    mark_dynamic(value, axis)


@contextmanager
def _autograd() -> Generator[None]:
    """Inside an operator, which is called below autograd, it records nevertheless."""
    functionality = torch._C.DispatchKey.AutogradFunctionality  # pyright: ignore[reportPrivateUsage]
    with torch._C._SetExcludeDispatchKeyGuard(functionality, False):  # pyright: ignore[reportPrivateUsage]
        yield


def _of_its_own(output: Tensor) -> Tensor:
    return output.detach().clone(memory_format=torch.contiguous_format)


def _gradients(record: tuple[list[Tensor], Tensor] | None, dy: Tensor) -> tuple[Tensor, ...]:
    assert record is not None, "its forward has kept it"
    with _autograd():
        return tuple(gradient.contiguous() for gradient in torch.autograd.grad(record[1], record[0], dy))
