"""Compiled decode steps compute what the model computes, in one graph for whatever is in a step."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel, load_base_model, wrap_model
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.sampling.compiled import CompiledModel
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.lora.kernel import has_kernel
from lorry.actors.training.engine import Engine
from lorry.wire.errors import UnsupportedModelError
from lorry.wire.types import SampleResponse

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_qwen3
from .test_decoder import PROMPTS, Letters, request, run, tokens_of
from .test_decoder_cache import logprobs_of_trainer
from .test_demo_model import ASSETS

LONG = pytest.mark.long


def _with_adapters(model: PreTrainedModel) -> tuple[BaseModel, list[Adapter | None]]:
    base = wrap_model(model)
    targets = attach_lora(base)
    specs = [AdapterSpec(rank, seed=rank) for rank in (3, 8, 16)]
    adapters = [targets.new_adapter(spec, "cpu", trainable=False) for spec in specs]
    for adapter in adapters:
        adapter.weights.normal_(0, 0.1, generator=torch.Generator().manual_seed(adapter.spec.rank))
        adapter.refresh()
    return base, [None, *adapters]


def _sample(base: BaseModel, adapters: list[Adapter | None], compiled: CompiledModel | None) -> list[SampleResponse]:
    """First one sequence alone, then many of every adapter, so that they are gathered, then many of one, then one's
    prompt while others decode."""
    decoder = Decoder(base, Letters(), 24, 16, 2**22, compiled, native=has_kernel(base))
    found = {}
    decoder.add("alone", request(PROMPTS[0], temperature=0), None, 0)
    found |= run(decoder)
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, request(prompt, 2, max_tokens=5 + i), adapters[i % len(adapters)], i, owner=str(i % 4))
    found |= run(decoder)
    decoder.add("many", request(PROMPTS[1], 20), adapters[2], 0)
    for _ in range(3):
        found |= {key: result for key, result, _ in decoder.step()}
    decoder.add("late", request(PROMPTS[2], include_prompt_logprobs=True), adapters[1], 0)
    found |= run(decoder)
    return list(found.values())


@pytest.mark.parametrize(
    "family",
    [pytest.param(tiny_qwen3, marks=LONG), tiny_gpt_oss, pytest.param(tiny_deepseek_v3, marks=LONG)],
)
def test_a_compiled_decoder_samples_what_the_model_does(family: Callable[[], PreTrainedModel]) -> None:
    base, adapters = _with_adapters(family())
    expected = _sample(base, adapters, None)
    compiled = CompiledModel(base)
    graphs = counters["stats"]["unique_graphs"]
    found = _sample(base, adapters, compiled)
    assert counters["stats"]["unique_graphs"] == graphs > 0, "nothing is compiled while somebody waits for a token"
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        for mine, other in zip(ours.sequences, theirs.sequences, strict=True):
            assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert ours.prompt_logprobs == pytest.approx(theirs.prompt_logprobs, abs=1e-4)


@pytest.mark.parametrize("compile_it", [False, pytest.param(True, marks=LONG)], ids=["as it is", "compiled"])
def test_a_bfloat16_model_samples_with_the_logprobs_that_its_trainer_computes(compile_it: bool) -> None:
    """One product that is rounded the other way, once in some thousands, is all that may lie between the two; from
    there on a sequence's logprobs differ by hundredths. Where the two paths round in other places, all of them do."""
    base = load_base_model(ASSETS / "base-model", dtype="bfloat16")
    targets = attach_lora(base)
    adapter = targets.new_adapter(AdapterSpec(rank=8), base.device)
    adapter.weights.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    decoder = Decoder(base, Letters(), 16, 512, 2**26, CompiledModel(base) if compile_it else None)
    prompts = [[(11 * i + j) % 2000 for j in range(20 + i)] for i in range(4)]
    for i, prompt in enumerate(prompts):
        decoder.add(i, request(prompt, 4, max_tokens=60, seed=i), adapter, 0)
    results = run(decoder)
    pool = AdapterPool(1, base.device)
    pool.add("run", adapter)
    found = [(prompt, sequence) for i, prompt in enumerate(prompts) for sequence in results[i].sequences]
    expected = logprobs_of_trainer(Engine(base, targets, pool), [(prompt, own.tokens) for prompt, own in found])
    gaps = torch.tensor([logprob for _, own in found for logprob in own.logprobs]).sub(torch.cat(expected)).abs()
    assert len(gaps) == 16 * 60
    assert gaps.mean() < 5e-3
    assert gaps.quantile(0.95) < 2e-2
    assert gaps.max() < 1e-1


def test_without_a_compiler_there_is_an_error_that_says_so() -> None:
    base = wrap_model(tiny_qwen3())
    attach_lora(base)
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/c++",), "fx_graph_cache": False}),
        pytest.raises(UnsupportedModelError, match=r"cannot be compiled.*No working C\+\+ compiler"),
    ):
        CompiledModel(base)


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = wrap_model(tiny_qwen3())
    attach_lora(base)
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs) + 1)
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        CompiledModel(base)
