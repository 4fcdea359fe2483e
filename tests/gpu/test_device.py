"""What a device computes, beside what a CPU does in float32: `make gpu` says which one, and `make test` runs it on the
CPU, so that the tests themselves are known to work.

In float32 the two are within 1e-4 of a value's greatest magnitude, since sums are made in another order. In bfloat16 a
gradient points where it should, and logprobs are within a few hundredths in the mean.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.adapters.snapshots import Snapshot, restore_state, write_snapshot
from lorry.actors.group.leader import Group
from lorry.actors.group.models import divide
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.lora import LoraTargets, attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import survey
from lorry.actors.sampling.compiled import CompiledModel
from lorry.actors.sampling.decoder import BLOCK_TOKENS, Decoder
from lorry.actors.training.compiled_layers import CompiledLayers
from lorry.actors.training.engine import Engine
from lorry.wire.commands import SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, OptimStepResponse, SampleResponse, SamplingParams
from tests.actors.models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe
from tests.actors.test_decoder import Letters
from tests.actors.workshop import job, logprobs, request

FAMILIES = (tiny_qwen3, tiny_llama, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3)
DTYPES = (torch.float32, torch.bfloat16)
Family = Callable[..., PreTrainedModel]
LENGTHS = ((12, 7, 30), (5, 1), (64,), (9, 33))


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


class Shop:
    """Four runs of different ranks, whose B is not zero, on a model on a device, in fewer slots than there are runs."""

    def __init__(self, family: Family, device: torch.device | str, dtype: torch.dtype, ranks: int = 1) -> None:
        model = family(initializer_range=0.05).to(dtype)
        base, targets = (wrap_model(model if ranks > 1 else model.to(device)), None)
        targets = attach_lora(base)
        self.group = Group(ranks, str(device), 1) if ranks > 1 else None
        if self.group is not None:
            base, targets = divide(self.group, base, targets)
        self.base: BaseModel = base
        self.targets: LoraTargets = targets
        self.pool = AdapterPool(4 if ranks > 1 else 3, base.device, lends=ranks > 1)
        self.engine = Engine(base, targets, self.pool, token_budget=64, logits_bytes=1 << 12)
        for i in range(4):
            self.pool.add(str(i), self.adapter(i))

    def adapter(self, i: int, *, trainable: bool = True) -> Adapter:
        adapter = self.targets.new_adapter(AdapterSpec(2 + 2 * i, seed=i), "cpu", trainable=trainable)
        generator = torch.Generator().manual_seed(i)
        for _, b in adapter.module_weights().values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
        adapter.refresh()
        return adapter

    def learn(self, loss_fn: str = "cross_entropy") -> list[torch.Tensor]:
        jobs = [job(str(i), request(i, lengths, loss_fn)) for i, lengths in enumerate(LENGTHS)]
        return [found for outcome in self.engine.forward_backward(jobs) for found in logprobs(outcome)]

    def grads(self) -> list[torch.Tensor]:
        return [self.pool.get(str(i)).grad.cpu() for i in range(4)]

    def step(self) -> None:
        steps = [(str(i), AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)) for i in range(4)]
        assert all(isinstance(outcome, OptimStepResponse) for outcome in self.engine.optim_step(steps))


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype, coarse: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if dtype == torch.float32:
            most = theirs.abs().max().clamp(min=1e-3).item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * most)
        elif coarse:
            assert (ours - theirs).abs().mean() < coarse
        else:
            assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.97


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_runs_train_as_on_a_cpu(family: Family, dtype: torch.dtype, device: torch.device) -> None:
    ours, theirs = Shop(family, device, dtype), Shop(family, "cpu", torch.float32)
    routed = family in (tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3) and dtype != torch.float32
    found, expected = ours.learn(), theirs.learn()
    if not routed:  # rounding sends some tokens to other experts
        assert_alike(found, expected, dtype, 0.05)
        assert_alike(ours.grads(), theirs.grads(), dtype, 0)
    for shop in (ours, theirs):
        shop.step()
    found, expected = ours.learn("ppo"), theirs.learn("ppo")
    if dtype == torch.float32:  # Adam's first steps are the signs of gradients, and rounding turns some
        assert_alike(found, expected, dtype, 0)
    assert all(adapter.weights.isfinite().all() for adapter in map(ours.pool.get, "0123"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_are_computed_again_give_the_same_gradients(dtype: torch.dtype, device: torch.device) -> None:
    shops = [Shop(tiny_qwen3, device, dtype) for _ in range(2)]
    shops[1].engine = Engine(
        shops[1].base, shops[1].targets, shops[1].pool, token_budget=64, logits_bytes=1 << 12, available=lambda: 1
    )
    for shop in shops:
        shop.learn()
    for found, expected in zip(shops[1].grads(), shops[0].grads(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_that_a_device_saved_is_restored_bit_for_bit(
    dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    shop = Shop(tiny_qwen3, device, dtype)
    shop.learn()
    shop.step()
    shop.learn()
    run = shop.pool.get("3")
    write_snapshot(Snapshot("run", str(tmp_path / "saved"), 1, run.state(copied=True)))
    back = shop.targets.new_adapter(run.spec, "cpu")
    restore_state(back, tmp_path / "saved")
    back.to(device)
    for name in ("weights", "grad", "exp_avg", "exp_avg_sq", "compute"):
        assert torch.equal(getattr(back, name).cpu(), getattr(run, name).cpu()), name


def sampled(shop: Shop, **settings: Any) -> list[SampleResponse]:
    tokens = 256 * survey(shop.base).token_bytes
    decoder = Decoder(shop.base, Letters(), 8, 16, BLOCK_TOKENS * tokens, settings.get("compiled"))
    params = SamplingParams(max_tokens=24, temperature=0.0, stop=[])
    for i in range(6):
        prompt = [(5 * i + j) % 90 for j in range(4 + 9 * i)]
        adapter = None if i == 5 else shop.pool.acquire([str(i % 3)])[0]
        decoder.add(i, SampleInput(ModelInput.from_ints(prompt), 1, params, include_prompt_logprobs=True), adapter, i)
    found: dict[object, SampleResponse] = {}
    while decoder.active:
        for key, result, _ in decoder.step():
            assert isinstance(result, SampleResponse), result
            found[key] = result
    return [found[i] for i in range(6)]


def of_prompts(responses: list[SampleResponse]) -> list[torch.Tensor]:
    return [torch.tensor((response.prompt_logprobs or [])[1:], dtype=torch.float32) for response in responses]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_runs_are_sampled_as_on_a_cpu(family: Family, dtype: torch.dtype, device: torch.device) -> None:
    ours, theirs = Shop(family, device, dtype), Shop(family, "cpu", torch.float32)
    found, expected = sampled(ours), sampled(theirs)
    if family in (tiny_qwen3, tiny_llama) or dtype == torch.float32:
        assert_alike(of_prompts(found), of_prompts(expected), dtype, 0.05)
    if dtype == torch.float32:
        for one, other in zip(found, expected, strict=True):
            assert one.sequences[0].tokens == other.sequences[0].tokens
    assert [len(response.sequences[0].tokens) for response in found] == [24] * 6


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_steps_sample_what_others_do(dtype: torch.dtype, device: torch.device) -> None:
    plain, compiled = Shop(tiny_qwen3, device, dtype), Shop(tiny_qwen3, device, dtype)
    expected, found = sampled(plain), sampled(compiled, compiled=CompiledModel(compiled.base))
    assert_alike(of_prompts(found), of_prompts(expected), dtype, 0.05)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_layers_train_what_others_do(dtype: torch.dtype, device: torch.device) -> None:
    plain, compiled = Shop(tiny_qwen3, device, dtype), Shop(tiny_qwen3, device, dtype)
    compiled.base.in_flight.layers = CompiledLayers(compiled.base, compiled.targets)
    assert_alike(compiled.learn(), plain.learn(), dtype, 0.05)
    assert_alike(compiled.grads(), plain.grads(), dtype, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_devices_train_together_as_one_cpu(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU, and a group wants two")
    ours, theirs = Shop(tiny_qwen3, device, dtype, ranks=2), Shop(tiny_qwen3, "cpu", torch.float32)
    assert ours.group is not None
    try:
        assert_alike(ours.learn(), theirs.learn(), dtype, 0.05)
        assert_alike(ours.grads(), theirs.grads(), dtype, 0)
    finally:
        ours.group.close()
