"""Gathered LoRA against a walk from segment to segment, while adapters of any rank come and go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.adapters import Adapter, AdapterSpec
from lorry.actors.base_model import BaseModel, wrap_model
from lorry.actors.decode_batch import segments_of
from lorry.actors.lora import LoraLinear, LoraTargets, attach_lora
from lorry.actors.lora_blocks import RANKS, LoraBlocks
from lorry.actors.lora_decode import Gathered, Segmented
from lorry.actors.survey import Survey, survey

from .models import tiny_qwen3

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


@pytest.fixture(scope="module")
def tiny() -> tuple[BaseModel, list[Adapter], Survey]:
    base = wrap_model(tiny_qwen3())
    targets = attach_lora(base)
    return base, [_adapter(targets, spec) for spec in SPECS], survey(base)


@given(BATCHES, st.integers(0, 2))
def test_gathering_equals_walking(
    tiny: tuple[BaseModel, list[Adapter], Survey], batches: list[dict[int, int]], bare: int
) -> None:
    base, adapters, shape = tiny
    modules = [module for module in base.model.modules() if isinstance(module, LoraLinear)]
    gathered, walked = Gathered(shape.groups, base.in_flight), Segmented(base.in_flight)
    for batch in batches:
        owners, counts = [adapters[i] for i in batch], list(batch.values())
        if not gathered.arrange(owners, counts, base.device):
            continue
        rows = sum(counts) + bare
        for group in shape.groups:
            x = torch.randn(rows, modules[group[0]].in_features)
            found = [gathered.linear(modules[module], x) for module in group]
            base.in_flight.segments = segments_of(owners, counts)
            expected = [walked.linear(modules[module], x) for module in group]
            base.in_flight.segments = []
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@given(st.lists(st.sets(st.integers(0, len(SPECS) - 1), min_size=1), min_size=1, max_size=6))
def test_adapters_held_fill_the_first_blocks(
    tiny: tuple[BaseModel, list[Adapter], Survey], sets: list[set[int]]
) -> None:
    _, adapters, shape = tiny
    blocks = LoraBlocks(shape.groups)
    for chosen in sets:
        blocks.hold([adapters[i] for i in chosen])
        assert set(blocks.of) == {adapters[i] for i in chosen}
        assert sorted(block for own in blocks.of.values() for block in own) == list(range(blocks.used))
        assert all(len(own) == -(-adapter.spec.rank // RANKS) for adapter, own in blocks.of.items())


def test_an_adapter_of_many_rows_among_others_of_one_is_walked(
    tiny: tuple[BaseModel, list[Adapter], Survey],
) -> None:
    base, adapters, shape = tiny
    gathered = Gathered(shape.groups, base.in_flight)
    assert gathered.arrange(adapters[:2], [3, 3], base.device)
    assert not gathered.arrange(adapters[:4], [30, 1, 1, 1], base.device)
    assert not gathered.arrange([], [], base.device)
