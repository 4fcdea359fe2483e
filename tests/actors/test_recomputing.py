"""Activation checkpointing: what is held, how many layers are computed again, and that nothing else changes."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.in_flight import InFlight, Segment
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.metering import Meter
from lorry.actors.model.recomputing import Bytes, PassCost
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.engine import Engine
from lorry.actors.training.foreseen import foresee_pass
from lorry.actors.training.pass_cost import Thrift, measure_pass, meter_pass
from lorry.wire.types import AdamParams

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl
from .pictures import wrap_with_eyes
from .test_images import EACH, data_of
from .workshop import Workshop, job, logprobs, request

FAMILIES = [tiny_qwen3, tiny_llama, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3]
LARGE = 2**40


def shop_of(family: Callable[[], PreTrainedModel], available: int, **options: object) -> Workshop:
    """With two runs, and passes that may hold so many bytes."""
    shop = Workshop(family(), **options)  # type: ignore[arg-type]
    shop.engine = Engine(shop.base, shop.targets, shop.pool, available=lambda: available)
    for name, rank in (("a", 4), ("b", 8)):
        shop.add(name, AdapterSpec(rank, seed=rank))
    return shop


def assert_same(shops: Sequence[Workshop], requests: Sequence[object]) -> None:
    """To the last bit: logprobs, losses, gradients, and the weights after a step."""
    found = []
    for shop in shops:
        jobs = [job(name, data) for name, data in zip("ab", requests, strict=True)]  # type: ignore[arg-type]
        outcomes = shop.engine.forward_backward(jobs)
        values = [p for outcome in outcomes for p in logprobs(outcome)]
        values += [shop.pool.get(name).grad.clone() for name in "ab"]
        shop.engine.optim_step([(name, AdamParams(learning_rate=1e-2)) for name in "ab"])
        found.append(values + [shop.pool.get(name).weights for name in "ab"])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_last_bit(family: Callable[[], PreTrainedModel]) -> None:
    """With none, one and both of two layers computed again."""
    plain = shop_of(family, LARGE)
    cost = measure_pass(plain.base, plain.targets)
    data = [request(1, (40, 40)), request(2, (40,), "ppo")]
    for again, available in ((1, cost.bytes([40] * 3, 1)), (2, 1)):
        thrifty = shop_of(family, available)
        seen: list[int] = []
        note(thrifty.base.in_flight, seen)
        assert_same([shop_of(family, LARGE), thrifty], data)
        assert set(seen) == {again}


def note(in_flight: InFlight, seen: list[int]) -> None:
    """What `again` is in the pauses of passes."""
    in_flight.on_pause = lambda: seen.append(in_flight.again) if in_flight.segments else None


def test_rows_with_images_are_computed_again_alike() -> None:
    shops = [shop_of(tiny_qwen3_vl, available, base=wrap_with_eyes) for available in (LARGE, 1)]
    assert_same(shops, [data_of(EACH, shops[0].base, 1), data_of([EACH[3], EACH[0]], shops[0].base, 2)])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_pass_holds_is_as_it_was_measured(family: Callable[[], PreTrainedModel]) -> None:
    """Exactly, but where attention has scores in memory: its greatest moment moves with the length. Where it has them
    in blocks, what is said is no less than what is held."""
    base = wrap_model(family())
    targets = attach_lora(base)
    cost = measure_pass(base, targets)
    assert cost.layers == 2
    segment = Segment(targets.new_adapter(AdapterSpec(8), base.device), 0, 0)
    off = {tiny_deepseek_v3: 0.15, tiny_gpt_oss: 0.35}.get(family, 0.05)
    for again in (0, 1, 2):
        _, most = meter_pass(base, segment, again, 250)
        said = cost.bytes([250], again)
        assert said == pytest.approx(most, rel=off)
        assert said >= most or family is not tiny_gpt_oss
    assert cost.held_again.of([250]) < 0.5 * cost.held.of([250])


def test_a_meter_counts_what_is_held_and_the_most_that_was() -> None:
    before = torch.zeros(1000)
    with Meter() as meter:
        held = before + 1
        gone = before * 2
        both = meter.live
        del gone
        view = held[:10]
    assert (meter.peak, both, meter.live) == (8000, 8000, 4000)
    assert view.shape == (10,)


costs = st.builds(
    lambda layers, again, more, extra, square: PassCost(
        layers,
        Bytes(again + more * layers, square * layers),
        Bytes(again + more * layers + extra, square * layers),
        Bytes(again, 0.0),
        Bytes(again + more + extra, square),
    ),
    st.integers(1, 100),
    st.floats(1, 1e4),
    st.floats(1, 1e4),
    st.floats(0, 1e4),
    st.sampled_from([0.0, 3.0]),
)


@given(cost=costs, lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=5), available=st.integers(0, 2**31 - 1))
def test_as_few_layers_as_fit_are_computed_again(cost: PassCost, lengths: list[int], available: int) -> None:
    again = cost.layers_again(lengths, available)
    assert 0 <= again <= cost.layers
    assert again == cost.layers or cost.bytes(lengths, again) <= available
    assert again == 0 or cost.bytes(lengths, again - 1) > available
    longest = cost.longest(available)
    assert cost.bytes([longest], cost.layers) <= available < cost.bytes([longest + 1], cost.layers)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_what_is_foreseen_is_what_is_measured(family: Callable[..., PreTrainedModel]) -> None:
    """From the configuration alone, of four layers from fewer: all but the scores that attention keeps."""
    model = family(num_hidden_layers=4)
    base = wrap_model(model)
    found, foreseen = measure_pass(base, attach_lora(base)), foresee_pass(model.config, torch.float32)
    assert foreseen.layers == 4
    keeps_scores = family in (tiny_gpt_oss, tiny_deepseek_v3)
    for name in ("held", "most", "held_again", "most_again"):
        ours, theirs = getattr(foreseen, name), getattr(found, name)
        assert ours.token == pytest.approx(theirs.token, rel=0.3 if keeps_scores else 0.05), name


def test_small_passes_are_not_measured() -> None:
    base = wrap_model(tiny_qwen3())
    thrift = Thrift(base, attach_lora(base), lambda: 2**30)
    assert thrift.layers_again([100, 100]) == 0
    assert thrift._cost is None  # pyright: ignore[reportPrivateUsage]


def test_where_memory_runs_out_layers_are_computed_again_before_passes_are_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop = shop_of(tiny_qwen3, LARGE)
    hidden_states, passes = type(shop.base).hidden_states, list[tuple[int, bool]]()

    def scarce(self: object, tokens: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        again = shop.base.in_flight.again > 0
        passes.append((len(tokens), again))
        if not again:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states(self, tokens, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(shop.base), "hidden_states", scarce)
    outcomes = shop.engine.forward_backward([job("a", request(1, (20, 30)))])
    assert passes == [(50, False), (50, True)]
    monkeypatch.undo()
    expected = shop_of(tiny_qwen3, LARGE).engine.forward_backward([job("a", request(1, (20, 30)))])
    for one, other in zip(logprobs(outcomes[0]), logprobs(expected[0]), strict=True):
        assert torch.equal(one, other)
