"""Base models that several processes share, beside the same in one: what they compute, refuse and survive."""

import gc
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from lorry.actors.adapters.checkpoints import load_state, save_state
from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.group.leader import Group
from lorry.actors.group.models import divide
from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.in_flight import InFlight
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.ranks import Ranks, RanksPartedError
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.kv_cache import KVCache
from lorry.actors.training.engine import Engine, ForwardBackwardJob
from lorry.wire.errors import UnsupportedModelError
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, OptimStepResponse

from .models import tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl_moe
from .placing import a_group, chosen_ranks
from .test_decoder import PROMPTS, new_decoder, run, tokens_of
from .test_decoder import request as sample_of
from .workshop import VOCAB, Family, Workshop, job, logprobs, request, succeeded

RANKS = [2, pytest.param(4, marks=pytest.mark.long)]
SPECS = [
    AdapterSpec(rank=8, seed=1),
    AdapterSpec(rank=1, seed=2, train_unembed=False),
    AdapterSpec(rank=3, seed=3, expert_lora="independent"),
]


def later(*after: int) -> list[Any]:
    """The same at other moments."""
    return [pytest.param(n, marks=pytest.mark.long) for n in after]


@pytest.fixture(autouse=True)
def both() -> None:
    if chosen_ranks[0] > 1:
        pytest.skip("these tests place their models themselves")


def shared(group: Group, model: PreTrainedModel, slots: int = 8, **options: Any) -> Workshop:
    shop = Workshop(model, slots)
    shop.base, shop.targets = divide(group, shop.base, shop.targets)
    shop.engine = Engine(shop.base, shop.targets, shop.pool, logits_bytes=4 * VOCAB * 11, **options)
    return shop


def assert_same(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-5) -> None:
    """Of the greatest value: sums over ranks are rounded in another order, and nothing else is different."""
    assert (found - expected).abs().max() <= within * expected.abs().max()


def wide_llama() -> PreTrainedModel:
    """Nothing is a multiple of anything."""
    return tiny_llama(vocab_size=101, intermediate_size=51, num_key_value_heads=1)


def few_experts() -> PreTrainedModel:
    return tiny_qwen3_moe(num_experts=3)


def one_expert() -> PreTrainedModel:
    return tiny_qwen3_moe(num_experts=1, num_experts_per_tok=1)


def tied() -> PreTrainedModel:
    return tiny_qwen3(tie_word_embeddings=True, attention_bias=True)


FAMILIES = [tied, wide_llama, tiny_gpt_oss, tiny_deepseek_v3, few_experts, one_expert, tiny_qwen3_vl_moe]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_compute_together_what_one_device_computes(family: Family, ranks: int) -> None:
    """Three steps of a mixed batch: logprobs, gradients, norms and weights. Each begins with the same weights: so
    random a model's gradient tells weights that differ in the last bit apart in its fifth digit, on one device too."""
    one, several = Workshop(family()), shared(a_group(ranks), family())
    for shop in (one, several):
        for i, spec in enumerate(SPECS):
            shop.add(str(i), spec)
    params = AdamParams(learning_rate=1e-3, eps=1e-3, weight_decay=0.1, grad_clip_norm=1.0)
    for step in range(3):
        jobs = [job(str(i), request(10 * step + i, lengths)) for i, lengths in enumerate([(5, 9, 5), (7,), (4, 12)])]
        assert_one_pass_is_the_same(one, several, jobs)
        steps = [(str(i), params) for i in range(len(SPECS))]
        for ours, theirs in zip(several.engine.optim_step(steps), one.engine.optim_step(steps), strict=True):
            assert isinstance(ours, OptimStepResponse) and isinstance(theirs, OptimStepResponse)
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-5)
        for i in range(len(SPECS)):
            ours, theirs = several.pool.get(str(i)), one.pool.get(str(i))
            assert_same(ours.weights, theirs.weights)
            ours.set_state(theirs.state(copied=True))


def assert_one_pass_is_the_same(one: Workshop, several: Workshop, jobs: Sequence[ForwardBackwardJob]) -> None:
    expected, found = one.engine.forward_backward(jobs), several.engine.forward_backward(jobs)
    for ours, theirs in zip(found, expected, strict=True):
        for p, q in zip(logprobs(ours), logprobs(theirs), strict=True):
            assert_same(p, q)
    for one_job in jobs:
        assert_same(several.pool.get(one_job.adapter).grad, one.pool.get(one_job.adapter).grad)


def test_ranks_know_every_loss() -> None:
    one, several = Workshop(tiny_qwen3()), shared(a_group(2), tiny_qwen3())
    for shop in (one, several):
        for i in range(6):
            shop.add(str(i), AdapterSpec(rank=4, seed=i))
    data = [
        request(0, (6, 3), "importance_sampling"),
        request(1, (4, 12), "ppo", clip_low_threshold=0.7),
        request(2, (6, 6), "cispo", clip_high_threshold=2.0),
        request(3, (1, 8), "dro", beta=0.3),
        request(4, (5, 3), candidates=3),
        request(7, (7, 4), "gspo", clip_low_threshold=0.5, clip_high_threshold=40.0),
    ]
    assert_one_pass_is_the_same(one, several, [job(str(i), each) for i, each in enumerate(data)])


def test_what_differs_in_float64_is_nothing() -> None:
    """So what differs in float32 is rounding."""
    one, several = Workshop(tiny_qwen3().double()), shared(a_group(2), tiny_qwen3().double())
    for shop in (one, several):
        shop.add("run", SPECS[0])
        succeeded(shop.engine.forward_backward([job("run", request(5, (5, 9, 14)))])[0])
    # Gradients are accumulated in float32 all the same.
    assert_same(several.pool.get("run").grad, one.pool.get("run").grad, 4e-7)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", [wide_llama, tiny_gpt_oss, tiny_deepseek_v3])
def test_ranks_sample_together_what_one_device_samples(family: Family, ranks: int) -> None:
    """Prompts of different lengths in chunks, several samples each, prompt logprobs, adapters and the bare base."""
    found: list[dict[Any, Any]] = []
    for group in (None, a_group(ranks)):
        shop = Workshop(family()) if group is None else shared(group, family())
        adapters = [shop.add(str(i), spec) for i, spec in enumerate(SPECS)]
        decoder = new_decoder(shop.base, 8, 13)
        for i, prompt in enumerate(PROMPTS):
            options = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2} if i % 2 else {}
            decoder.add(i, sample_of(prompt, 3, max_tokens=9, seed=i, **options), [None, *adapters][i % 4], 0, "owner")
        found.append(run(decoder))
    one, several = found
    for i in range(len(PROMPTS)):
        assert tokens_of(several[i]) == tokens_of(one[i])
        for ours, theirs in zip(several[i].sequences, one[i].sequences, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        if i % 2:
            assert several[i].prompt_logprobs[1:] == pytest.approx(one[i].prompt_logprobs[1:], abs=1e-4)


def test_a_run_goes_on_on_one_device_from_what_ranks_saved_and_the_other_way(tmp_path: Path) -> None:
    one, several = Workshop(tiny_qwen3_moe()), shared(a_group(2), tiny_qwen3_moe())
    for source, target in ((one, several), (several, one)):
        key = f"from {target is one}"
        adapter = source.add(key, SPECS[0])
        succeeded(source.engine.forward_backward([job(key, request(1))])[0])
        source.engine.optim_step([(key, AdamParams(learning_rate=1e-2))])
        first, second = tmp_path / f"{key} first", tmp_path / f"{key} second"
        save_state(adapter, source.targets, first, "tiny")
        moved = target.targets.new_adapter(SPECS[0], target.base.device)
        load_state(moved, first, optimizer=True)
        target.pool.add(key, moved)
        save_state(moved, target.targets, second, "tiny")
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
        expected = source.engine.forward_backward([job(key, request(2))])[0]
        for p, q in zip(
            logprobs(target.engine.forward_backward([job(key, request(2))])[0]), logprobs(expected), strict=True
        ):
            assert_same(p, q)


@pytest.mark.parametrize(
    ("family", "ranks", "problem"),
    [
        (
            lambda: tiny_llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=3),
            2,
            "3 attention heads cannot be divided",
        ),
        (
            lambda: tiny_llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=3),
            2,
            "3 heads of keys and values",
        ),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused_and_is_as_it_was(
    family: Callable[[], PreTrainedModel], ranks: int, problem: str
) -> None:
    base = wrap_model(family())
    targets = attach_lora(base)
    with pytest.raises(UnsupportedModelError, match=problem):
        divide(a_group(ranks), base, targets)
    engine = Engine(base, targets, AdapterPool(2, "cpu"))
    engine.pool.add("run", targets.new_adapter(SPECS[0], "cpu"))
    succeeded(engine.forward_backward([job("run", request(1))])[0])


def test_a_model_whose_ranks_compute_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = wrap_model(tiny_qwen3())
    targets, right = attach_lora(base), Ranks.sum_
    monkeypatch.setattr(Ranks, "sum_", lambda ranks, x: right(ranks, x).mul_(1.1))  # pyright: ignore
    with pytest.raises(UnsupportedModelError, match="computes something else on several devices"):
        divide(a_group(2), base, targets)


class Faulty:
    """Two ranks, of which the second fails when it is told to: see `faulty_rank`."""

    def __init__(self, folder: Path, ended: Callable[[int], None]) -> None:
        self._fault = folder / "fault"
        self.group = Group(
            2, "cpu", 1, ended=ended, program=(str(Path(__file__).parent / "faulty_rank.py"), str(self._fault))
        )

    def fail(self, what: str, after: int) -> None:
        aside = self._fault.with_suffix(".aside")
        aside.write_text(f"{what} {after}")
        aside.rename(self._fault)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Generator[Faulty]:
    ended: list[int] = []
    faulty = Faulty(tmp_path_factory.mktemp("faulty"), ended.append)
    with faulty.group:
        yield faulty
    assert ended == []


@pytest.mark.parametrize("after", [0, 8, *later(3, 11)])
def test_where_a_rank_finds_no_memory_the_pass_is_tried_again_in_smaller_ones(faulty: Faulty, after: int) -> None:
    one, several = Workshop(tiny_qwen3()), shared(faulty.group, tiny_qwen3())
    data = [request(1, (5, 9, 14)), request(2, (7,))]
    for shop in (one, several):
        for i, spec in enumerate(SPECS[:2]):
            shop.add(str(i), spec)
        if shop is several:
            faulty.fail("memory", after)
        # The second time there are gradients that a failure must leave as they are.
        for _ in range(2):
            for outcome in shop.engine.forward_backward([job(str(i), each) for i, each in enumerate(data)]):
                succeeded(outcome)
    for key in "01":
        assert_same(several.pool.get(key).grad, one.pool.get(key).grad)


@pytest.mark.parametrize("after", [0, 6])
def test_a_bug_in_a_rank_is_told_and_leaves_the_gradient_as_it_was(faulty: Faulty, after: int) -> None:
    shop = shared(faulty.group, tiny_qwen3())
    adapter = shop.add("run", SPECS[0])
    succeeded(shop.engine.forward_backward([job("run", request(1))])[0])
    before = adapter.grad.clone()
    faulty.fail("bug", after)
    with pytest.raises(RuntimeError, match="another rank raised ValueError: a bug"):
        shop.engine.forward_backward([job("run", request(2))])
    assert torch.equal(adapter.grad, before)
    succeeded(shop.engine.forward_backward([job("run", request(2))])[0])
    alone = Workshop(tiny_qwen3())
    alone.add("run", SPECS[0])
    for seed in (1, 2):
        alone.engine.forward_backward([job("run", request(seed))])
    assert_same(adapter.grad, alone.pool.get("run").grad)


@pytest.mark.parametrize("after", [2, *later(0, 5, 9)])
def test_requests_get_their_tokens_where_a_rank_finds_no_memory_for_a_step(faulty: Faulty, after: int) -> None:
    found: list[dict[Any, Any]] = []
    for shop in (Workshop(tiny_qwen3()), shared(faulty.group, tiny_qwen3())):
        adapters = [shop.add(str(i), spec) for i, spec in enumerate(SPECS)]
        decoder = new_decoder(shop.base, 8, 13)
        for i, prompt in enumerate(PROMPTS):
            decoder.add(i, sample_of(prompt, 2, max_tokens=6, seed=i), [None, *adapters][i % 4], 0, "owner")
        decoder.step()
        if found:
            faulty.fail("memory", after)
        found.append(run(decoder))
    for i in range(len(PROMPTS)):
        assert tokens_of(found[1][i]) == tokens_of(found[0][i])


def steps_beside(in_flight: InFlight, decoder: Decoder, finished: dict[Any, Any]) -> Callable[[], None]:
    """What decodes in a pause."""

    def decode() -> None:
        with in_flight.set_aside():
            if decoder.active:
                finished.update({key: result for key, result, _ in decoder.step(others_hold_memory=True)})

    return decode


@pytest.mark.parametrize("after", [1, 12, *later(0, 2, 7, 19, 30, 45)])
def test_a_pass_and_the_steps_in_its_pauses_survive_a_rank_that_finds_no_memory(faulty: Faulty, after: int) -> None:
    """Whichever of both it fails in."""
    alone = Workshop(tiny_qwen3())
    alone.add("run", SPECS[0])
    succeeded(alone.engine.forward_backward([job("run", request(1, (5, 9, 14)))])[0])
    shop = shared(faulty.group, tiny_qwen3())
    adapter, sampler = shop.add("run", SPECS[0]), shop.add("sampler", SPECS[2])
    decoder, in_flight, finished = new_decoder(shop.base, 8, 13), shop.base.in_flight, dict[Any, Any]()
    for i, prompt in enumerate(PROMPTS):
        decoder.add(i, sample_of(prompt, max_tokens=20, seed=i), [None, sampler][i % 2], 0, "owner")

    in_flight.on_pause = steps_beside(in_flight, decoder, finished)
    faulty.fail("memory", after)
    succeeded(shop.engine.forward_backward([job("run", request(1, (5, 9, 14)))])[0])
    assert_same(adapter.grad, alone.pool.get("run").grad)
    in_flight.on_pause = lambda: None
    while decoder.active:
        finished |= {key: result for key, result, _ in decoder.step()}
    expected = new_decoder(shop.base, 8, 13)
    for i, prompt in enumerate(PROMPTS):
        expected.add(i, sample_of(prompt, max_tokens=20, seed=i), [None, sampler][i % 2], 0, "owner")
    for key, response in run(expected).items():
        assert tokens_of(finished[key]) == tokens_of(response)


@pytest.mark.parametrize("after", [0, 2, *later(1, 4, 5)])
def test_a_lone_request_in_a_pause_is_not_blamed_for_the_pass(faulty: Faulty, after: int) -> None:
    """A rank that fails between two sums of a pass is not there for the step in the next pause."""
    shop = shared(faulty.group, tiny_qwen3())
    shop.add("run", SPECS[0])
    decoder, in_flight, finished = new_decoder(shop.base, 8, 13), shop.base.in_flight, dict[Any, Any]()
    decoder.add("alone", sample_of(PROMPTS[0], max_tokens=30, seed=1), None, 0)

    in_flight.on_pause = steps_beside(in_flight, decoder, finished)
    faulty.fail("product", after)
    succeeded(shop.engine.forward_backward([job("run", request(1, (5, 9, 14)))])[0])
    in_flight.on_pause = lambda: None
    while decoder.active:
        finished |= {key: result for key, result, _ in decoder.step()}
    expected = new_decoder(Workshop(tiny_qwen3()).base, 8, 13)
    expected.add("alone", sample_of(PROMPTS[0], max_tokens=30, seed=1), None, 0)
    assert tokens_of(finished["alone"]) == tokens_of(run(expected)["alone"])


def test_a_step_that_fails_where_others_have_done_theirs_leaves_the_pass_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop = shared(a_group(2), tiny_qwen3())
    adapter = shop.add("run", SPECS[0])
    decoder, in_flight, failures = new_decoder(shop.base, 8, 13), shop.base.in_flight, [1]
    decoder.add("one", sample_of(PROMPTS[0], max_tokens=40, seed=1), None, 0)
    clear = KVCache.clear

    def scarce(cache: KVCache, blocks: Sequence[int]) -> None:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        clear(cache, blocks)

    monkeypatch.setattr(KVCache, "clear", scarce)

    in_flight.on_pause = steps_beside(in_flight, decoder, {})
    succeeded(shop.engine.forward_backward([job("run", request(1))])[0])
    assert not failures
    alone = Workshop(tiny_qwen3())
    alone.add("run", SPECS[0])
    alone.engine.forward_backward([job("run", request(1))])
    assert_same(adapter.grad, alone.pool.get("run").grad)


def test_an_adapter_that_finds_no_room_at_home_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = shared(a_group(2), tiny_qwen3())
    adapter = shop.add("run", SPECS[0])
    weights = adapter.weights.clone()
    succeeded(shop.engine.forward_backward([job("run", request(1))])[0])

    def scarce(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("lorry.actors.model.adapter.torch.zeros_like", scarce)
        patched.setattr("lorry.actors.group.adapters.put_together", scarce)
        with pytest.raises(MemoryError):
            adapter.to("cpu")
    assert adapter.away is not None
    assert torch.equal(adapter.weights, weights)


def test_what_nobody_uses_any_more_is_dropped_by_all() -> None:
    """Prompts are scored through adapters that come and go."""
    group, before = a_group(2), 0
    shop = shared(group, tiny_qwen3())
    decoder = new_decoder(shop.base, 8, 13)
    for round_ in range(2):
        for i in range(8):
            adapter = shop.targets.new_adapter(AdapterSpec(rank=64, seed=i), "cpu", trainable=False)
            decoder.add_prompt(i, ModelInput.from_ints(PROMPTS[1]), adapter)
            run(decoder)
            del adapter
        gc.collect()
        resident = psutil.Process(group.processes[0].pid).memory_info().rss
        assert round_ == 0 or resident < before + 2**22
        before = resident


def test_the_death_of_a_rank_is_told_at_once(tmp_path: Path) -> None:
    died, who = threading.Event(), list[int]()

    def ended(rank: int) -> None:
        who.append(rank)
        died.set()

    faulty = Faulty(tmp_path, ended)
    with faulty.group:
        shop = shared(faulty.group, tiny_qwen3())
        shop.add("run", SPECS[0])
        faulty.fail("die", 4)
        with pytest.raises((RanksPartedError, EOFError, BrokenPipeError)):
            shop.engine.forward_backward([job("run", request(1))])
        died.wait()
    assert who == [1]


def test_ranks_end_with_the_first_one(tmp_path: Path) -> None:
    group = Group(3, "cpu", 1)
    processes = group.processes
    assert [process.poll() for process in processes] == [None, None]
    group.close()
    assert [process.returncode for process in processes] == [0, 0]
