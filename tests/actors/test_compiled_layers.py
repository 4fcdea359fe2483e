"""Compiled layers train what the model's own train, in one graph for each kind of layer, whatever is in a pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.sampling.compiled import CompiledModel
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.training.compiled_layers import CompiledLayers
from lorry.actors.training.engine import Engine
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.errors import UnsupportedModelError
from lorry.wire.types import AdamParams

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl
from .pictures import wrap_with_eyes
from .test_decoder import PROMPTS, Letters
from .test_decoder import request as sample_of
from .test_images import EACH, data_of
from .workshop import Workshop, assert_close, job, logprobs, request, succeeded

LONG = pytest.mark.long
RANKS = {"a": 4, "b": 8}
PASSES = [
    (request(1, (40, 40)), request(2, (40,), "ppo")),
    (request(3, (5, 9)), request(4, (2,), "ppo")),
    (request(5, (1,)), request(6, (60, 3, 17), candidates=3)),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """A process may have so many graphs of one function."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shop_of(model: PreTrainedModel, **options: Any) -> Workshop:
    shop = Workshop(model, **options)
    for name, rank in RANKS.items():
        shop.add(name, AdapterSpec(rank, seed=rank))
    return shop


def compiled(shop: Workshop) -> Workshop:
    shop.base.in_flight.layers = CompiledLayers(shop.base, shop.targets)
    return shop


def train(shop: Workshop, passes: Sequence[tuple[ForwardBackwardInput, ForwardBackwardInput]]) -> list[torch.Tensor]:
    """Logprobs, and gradients before each step."""
    found = list[torch.Tensor]()
    for requests in passes:
        jobs = [job(name, data) for name, data in zip(RANKS, requests, strict=True)]
        found += [p for outcome in shop.engine.forward_backward(jobs) for p in logprobs(outcome)]
        found += [shop.pool.get(name).grad.clone() for name in RANKS]
        shop.engine.optim_step([(name, AdamParams(learning_rate=1e-3)) for name in RANKS])
    return found


@pytest.mark.parametrize(
    "family",
    [tiny_gpt_oss, *(pytest.param(f, marks=LONG) for f in (tiny_qwen3, tiny_llama, tiny_qwen3_moe, tiny_deepseek_v3))],
)
def test_compiled_layers_train_what_the_models_own_do(family: Callable[[], PreTrainedModel]) -> None:
    plain, fast = shop_of(family()), compiled(shop_of(family()))
    graphs = counters["stats"]["unique_graphs"]
    for found, expected in zip(train(fast, PASSES), train(plain, PASSES), strict=True):
        assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == graphs > 0, "nothing is compiled while somebody waits"


def test_what_passes_have_beside_layers_changes_nothing_of_it() -> None:
    """Layers that are computed again, steps of a compiled decoder in the pauses, and passes that failed in the middle,
    forward and back."""
    shop = compiled(shop_of(tiny_qwen3()))
    in_flight = shop.base.in_flight
    engine, thrifty = (engine_of(shop, available) for available in (2**40, 1))
    expected = gradients(shop, engine)
    seen = list[int]()
    in_flight.on_pause = lambda: seen.append(in_flight.again) if in_flight.segments else None
    assert all(map(torch.equal, gradients(shop, thrifty), expected))
    assert set(seen) == {2}
    pauses = len(seen)

    decoder = Decoder(shop.base, Letters(), 24, 16, 2**22, CompiledModel(shop.base))
    sampler = shop.targets.new_adapter(AdapterSpec(8, seed=1), "cpu", trainable=False)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, sample_of(prompt, 2, max_tokens=200), [None, sampler][i % 2], 0)
    steps = list[int]()

    def decode() -> None:
        with in_flight.set_aside():
            decoder.step()
            steps.append(decoder.active)

    in_flight.on_pause = decode
    assert all(map(torch.equal, gradients(shop, engine), expected))
    assert len(steps) > 20 and steps[-1] > 0

    class Fault(Exception):
        pass

    for after in (3, pauses // 2, pauses - 3):
        countdown = iter(range(after, -1, -1))

        def fail(countdown: Iterator[int] = countdown) -> None:
            if next(countdown) == 0:
                raise Fault

        in_flight.on_pause = fail
        with pytest.raises(Fault):
            gradients(shop, thrifty)
        in_flight.on_pause = lambda: None
        assert all(map(torch.equal, gradients(shop, engine), expected))


def engine_of(shop: Workshop, available: int) -> Engine:
    return Engine(shop.base, shop.targets, shop.pool, available=lambda: available)


def gradients(shop: Workshop, engine: Engine) -> list[torch.Tensor]:
    jobs = [job(name, data) for name, data in zip(RANKS, PASSES[0], strict=True)]
    for name in RANKS:
        shop.pool.get(name).discard()
    for outcome in engine.forward_backward(jobs):
        succeeded(outcome)
    return [shop.pool.get(name).grad.clone() for name in RANKS]


@LONG
def test_rows_with_images_go_through_the_same_graphs() -> None:
    shops = [shop_of(tiny_qwen3_vl(), base=wrap_with_eyes) for _ in range(2)]
    requests = data_of(EACH, shops[0].base, 1), data_of([EACH[3], EACH[0]], shops[0].base, 2)
    for found, expected in zip(train(compiled(shops[0]), [requests]), train(shops[1], [requests]), strict=True):
        assert_close(found, expected)


@LONG
def test_a_bfloat16_models_logprobs_are_its_own() -> None:
    """Rounded where the model rounds: what is left are products that find their inputs rounded the other way."""
    plain, fast = (shop_of(tiny_qwen3().to(torch.bfloat16)) for _ in range(2))  # type: ignore[arg-type]
    found, expected = train(compiled(fast), PASSES[:1]), train(plain, PASSES[:1])
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert (ours - theirs).abs().max() < 2e-2
    for ours, theirs in zip(found[3:], expected[3:], strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_graphs_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = wrap_model(tiny_qwen3())
    targets = attach_lora(base)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs) * 1.01)
    with pytest.raises(UnsupportedModelError, match="computes something else when its layers are compiled"):
        CompiledLayers(base, targets)
    assert base.in_flight.layers is None
