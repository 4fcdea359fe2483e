"""What a decode step computes of the trainable layers, against each layer and each adapter on its own, while adapters
of any rank come and go."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.lora import LoraLinear, LoraTargets, attach_lora, layers_of
from lorry.actors.model.products import linear_float32
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import Survey, survey
from lorry.actors.sampling.decode_batch import segments_of
from lorry.actors.sampling.decode_linears import DecodeLinears
from lorry.actors.sampling.lora.blocks import RANKS, LoraBlocks
from lorry.actors.sampling.lora.gathered import Gathered
from lorry.actors.sampling.lora.kernel import load_kernel
from lorry.actors.sampling.lora.native import SHORT

from .models import tiny_qwen3
from .workshop import assert_close

SPECS = [
    AdapterSpec(rank, seed=rank, train_mlp=mlp, train_unembed=unembed)
    for rank, mlp, unembed in (
        (1, True, True),
        (8, False, False),
        (11, True, False),
        (16, False, True),
        (40, True, True),
    )
]
BATCHES = st.lists(
    st.dictionaries(st.integers(0, len(SPECS) - 1), st.integers(1, 5), min_size=1), min_size=1, max_size=4
)


def _adapter(targets: LoraTargets, spec: AdapterSpec) -> Adapter:
    adapter = targets.new_adapter(spec, "cpu", trainable=False)
    adapter.weights.normal_(0, 0.3, generator=torch.Generator().manual_seed(spec.seed))
    adapter.refresh()
    return adapter


Tiny = tuple[BaseModel, list[Adapter], Survey]


@pytest.fixture(scope="module", params=[False, True], ids=["without biases", "with biases"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    load_kernel()
    base = wrap_model(tiny_qwen3(attention_bias=request.param))
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    targets = attach_lora(base)
    return base, [_adapter(targets, spec) for spec in SPECS], survey(base)


def _expected(module: LoraLinear, x: torch.Tensor, owners: Sequence[Adapter | None]) -> torch.Tensor:
    rows = F.linear(x, module.weight, module.bias)
    for row, (tokens, owner) in enumerate(zip(x, owners, strict=True)):
        part = owner.part(module.index) if owner else None
        if part is not None:
            rows[row] += part.scale * tokens @ part.a_t @ part.b
    return rows


@given(BATCHES, st.integers(0, 2), st.booleans(), st.booleans())
def test_gathered_or_walked_every_row_goes_through_its_own_adapter(
    tiny: Tiny, batches: list[dict[int, int]], bare: int, walk: bool, native: bool
) -> None:
    base, adapters, shape = tiny
    modules = layers_of(base)
    linears = DecodeLinears(base, shape.groups, native=native)
    for batch in batches:
        chosen, counts = [adapters[i] for i in batch], list(batch.values())
        owners = [adapter for adapter, count in zip(chosen, counts, strict=True) for _ in range(count)]
        linears.gathering = linears.arrange(chosen, counts, base.device) and not walk
        base.in_flight.segments = [] if linears.gathering else segments_of(owners, [1] * len(owners))
        for group in shape.groups:
            x = torch.randn(len(owners) + bare, modules[group[0]].in_features)
            found = [linears.linear(module, x[None])[0] for module in group]
            for module, ours in zip(group, found, strict=True):
                expected = _expected(modules[module], x, [*owners, *[None] * bare])
                assert_close(ours, expected)
        base.in_flight.segments = []
        linears.retain(chosen)


def test_in_low_precision_the_bases_products_are_torchs_own_but_for_the_heads_which_are_in_float32() -> None:
    base = wrap_model(tiny_qwen3().bfloat16())
    attach_lora(base)
    modules = layers_of(base)
    linears = DecodeLinears(base, (groups := survey(base).groups), native=False)
    for group in groups:
        x = torch.randn(3, modules[group[0]].in_features, dtype=torch.bfloat16)
        for module in group:
            product = linear_float32 if modules[module] is base.model.get_output_embeddings() else F.linear
            assert linears.linear(module, x).equal(product(x, modules[module].weight))


@given(st.lists(st.sets(st.integers(0, len(SPECS) - 1), min_size=1), min_size=1, max_size=6))
def test_adapters_held_fill_the_first_blocks(tiny: Tiny, sets: list[set[int]]) -> None:
    _, adapters, shape = tiny
    blocks = LoraBlocks(shape.groups)
    for chosen in sets:
        blocks.hold([adapters[i] for i in chosen])
        assert set(blocks.of) == {adapters[i] for i in chosen}
        assert sorted(block for own in blocks.of.values() for block in own) == list(range(blocks.used))
        assert all(len(own) == -(-adapter.spec.rank // RANKS) for adapter, own in blocks.of.items())


def test_the_kernel_computes_short_prompts_and_leaves_long_ones(tiny: Tiny) -> None:
    base, adapters, shape = tiny
    layers, linears = layers_of(base), DecodeLinears(base, shape.groups, native=True)
    lengths = [SHORT, SHORT + 1, 3]
    owners = [owner for owner, n in zip(adapters, lengths, strict=False) for _ in range(n)]
    base.in_flight.segments = segments_of(adapters[:3], lengths)
    for group in shape.groups:
        x = torch.randn(sum(lengths), layers[group[0]].in_features)
        for index in group:
            assert_close(linears.linear(index, x[None])[0], _expected(layers[index], x, owners))
    base.in_flight.segments = []


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(tiny: Tiny) -> None:
    base, adapters, shape = tiny
    layers, linears = layers_of(base), DecodeLinears(base, shape.groups, native=True)
    linears.gathering = linears.arrange(adapters[:2], [2, 1], base.device)
    index = shape.groups[0][0]
    x = torch.randn(3, layers[index].in_features)
    x[1] = torch.nan
    found = linears.linear(index, x)
    assert found[1].isnan().all()
    assert_close(found[[0, 2]], _expected(layers[index], x[[0, 2]], adapters[:2]))


def test_gathering_is_for_many_adapters_of_few_rows_each(tiny: Tiny) -> None:
    base, adapters, shape = tiny
    gathered = Gathered(shape.groups)
    assert gathered.arrange(adapters[:2], [3, 3], base.device)
    assert not gathered.arrange(adapters[:2], [8, 8], base.device)
    assert not gathered.arrange(adapters[:4], [20, 1, 1, 1], base.device), "room for twenty rows in every block"
    assert not gathered.arrange([], [], base.device)
