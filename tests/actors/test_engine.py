from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.logprobs import OutputHead
from lorry.wire.errors import InvalidRequestError, LorryError, NonFiniteError, NotFoundError, OutOfMemoryError
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, Datum

from .models import tiny_llama, tiny_qwen3, tiny_qwen3_vl
from .placing import chosen_ranks
from .reference import PeftRun
from .workshop import Family, Workshop, assert_close, job, logprobs, request, succeeded

SPECS = [
    AdapterSpec(rank=2, seed=0),
    AdapterSpec(rank=4, seed=1, train_mlp=False),
    AdapterSpec(rank=8, seed=2, train_attn=False),
    AdapterSpec(rank=16, seed=3, train_unembed=False),
    AdapterSpec(rank=3, seed=4, alpha=8.0, train_attn=False, train_mlp=False),
    AdapterSpec(rank=5, seed=5, train_mlp=False, train_unembed=False),
]


def requests(seed: int) -> list[Any]:
    return [
        request(seed, (5, 9, 5)),
        request(seed + 1, (7,), "importance_sampling"),
        request(seed + 2, (4, 12), "ppo", clip_low_threshold=0.7),
        request(seed + 3, (6, 6), "cispo", clip_high_threshold=2.0),
        request(seed + 4, (1, 8), "dro", beta=0.3),
        request(seed + 5, (5, 3), candidates=3),
    ]


def test_a_sequence_ratio_spans_the_chunks_of_the_head_and_stays_in_its_own_sequence() -> None:
    shop = Workshop(tiny_qwen3())
    adapter, other = shop.add("gspo", AdapterSpec(rank=4, seed=1)), shop.add("other", AdapterSpec(rank=4, seed=2))
    reference = PeftRun(tiny_qwen3(), adapter)
    data = request(7, (30, 5, 14), "gspo", clip_low_threshold=0.5, clip_high_threshold=40.0)
    gspo, _ = shop.engine.forward_backward([job("gspo", data), job("other", request(8, (9,), "importance_sampling"))])
    expected, loss = reference.forward_backward(data)
    for found, logprob in zip(logprobs(gspo), expected, strict=True):
        assert_close(found, logprob)
    assert succeeded(gspo).metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert adapter.grad.abs().max() > 0
    assert other.grad.abs().max() > 0
    assert_close(adapter.grad, reference.grad())


@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama, tiny_qwen3_vl])
def test_a_mixed_micro_batch_equals_peft_run_after_run(family: Family) -> None:
    assert_mixed_equals_peft(family, SPECS)


def assert_mixed_equals_peft(family: Family, specs: Sequence[AdapterSpec]) -> None:
    """Three steps: logprobs, losses, gradients and weights."""
    shop = Workshop(family())
    adapters = [shop.add(str(i), spec) for i, spec in enumerate(specs)]
    references = [PeftRun(family(), adapter) for adapter in adapters]
    for step in range(3):
        batch = requests(10 * step)
        outcomes = shop.engine.forward_backward([job(str(i), data) for i, data in enumerate(batch)])
        for outcome, adapter, reference, data in zip(outcomes, adapters, references, batch, strict=True):
            expected, loss = reference.forward_backward(data)
            for found, logprob in zip(logprobs(outcome), expected, strict=True):
                assert_close(found, logprob)
            assert succeeded(outcome).metrics["loss:sum"] == pytest.approx(loss, rel=1e-5, abs=1e-4)
            assert_close(adapter.grad, reference.grad())
        params = AdamParams(learning_rate=1e-3, eps=1e-3, weight_decay=0.1, grad_clip_norm=1.0)
        shop.engine.optim_step([(str(i), params) for i in range(len(specs))])
        for adapter, reference in zip(adapters, references, strict=True):
            reference.step(params)
            assert_close(adapter.weights, reference.weights())


def test_a_run_computes_the_same_alone_and_in_company() -> None:
    shop = Workshop(tiny_qwen3())
    adapters = [shop.add(str(i), AdapterSpec(rank=2 + i, seed=i)) for i in range(8)]
    jobs = [job(str(i), request(i, (4, 11, 3))) for i in range(8)]
    together = [logprobs(outcome) for outcome in shop.engine.forward_backward(jobs)]
    grads = [adapter.grad.clone() for adapter in adapters]
    for i, adapter in enumerate(adapters):
        adapter.grad.zero_()
        alone = logprobs(shop.engine.forward_backward([jobs[i]])[0])
        assert_close(grads[i], adapter.grad)
        for found, expected in zip(together[i], alone, strict=True):
            assert_close(found, expected)


def test_commands_of_one_run_add_their_gradients() -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    shop.engine.forward_backward([job("run", request(0)), job("run", request(1, loss_fn="ppo"))])
    together = adapter.grad.clone()
    adapter.grad.zero_()
    shop.engine.forward_backward([job("run", request(0))])
    shop.engine.forward_backward([job("run", request(1, loss_fn="ppo"))])
    assert_close(together, adapter.grad)


def test_forward_gives_the_same_logprobs_and_no_gradient() -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    jobs = [job("run", request(0), backward=False), job("run", request(0))]
    forward = shop.engine.forward_backward(jobs[:1])
    assert not adapter.pending
    assert adapter.grad.abs().max() == 0
    both = shop.engine.forward_backward(jobs)
    for alone, beside, trained in zip(*map(logprobs, (*forward, *both)), strict=True):
        assert_close(alone, beside)
        assert_close(alone, trained)


def test_a_budget_of_few_tokens_gives_the_same_as_one_pass() -> None:
    whole, split = Workshop(tiny_qwen3()), Workshop(tiny_qwen3(), token_budget=10)
    for shop in (whole, split):
        for i in range(3):
            shop.add(str(i), AdapterSpec(rank=4, seed=i))
    jobs = [job(str(i), request(i, (8, 3, 20))) for i in range(3)]
    one, many = (shop.engine.forward_backward(jobs) for shop in (whole, split))
    for a, b in zip(one, many, strict=True):
        assert_close(torch.cat(logprobs(b)), torch.cat(logprobs(a)))
    for i in range(3):
        assert_close(split.pool.get(str(i)).grad, whole.pool.get(str(i)).grad)


def test_three_slots_serve_eight_runs_as_eight_slots_do() -> None:
    wide, narrow = Workshop(tiny_qwen3(), slots=8), Workshop(tiny_qwen3(), slots=3)
    for shop in (wide, narrow):
        for i in range(8):
            shop.add(str(i), AdapterSpec(rank=2 + i, seed=i))
        for step in range(2):
            shop.engine.forward_backward([job(str(i), request(i + step)) for i in range(8)])
            shop.engine.optim_step([(str(i), AdamParams()) for i in range(8)])
    assert wide.pool.swaps_out == 0
    assert narrow.pool.swaps_out >= 10
    assert len(narrow.pool.hot) <= 3
    for i in range(8):
        assert_close(narrow.pool.get(str(i)).weights, wide.pool.get(str(i)).weights)


def poisoned(seed: int) -> Any:
    """exp(p - q) overflows float32."""
    data = request(seed, (6,), "importance_sampling")
    data.data[0].loss_fn_inputs["logprobs"].to_numpy()[3] = -1000.0
    data.data[0].loss_fn_inputs["weights"].to_numpy()[3] = 1.0
    return data


@pytest.mark.parametrize("pending", [False, True], ids=["nothing pending", "gradients pending"])
def test_a_poisoned_command_fails_alone(pending: bool) -> None:
    shop, clean = Workshop(tiny_qwen3()), Workshop(tiny_qwen3())
    for each in (shop, clean):
        each.add("ill", AdapterSpec(rank=4, seed=0))
        each.add("well", AdapterSpec(rank=8, seed=1))
        if pending:
            each.engine.forward_backward([job("ill", request(7))])
    outcomes = shop.engine.forward_backward([job("ill", request(1)), job("well", request(2)), job("ill", poisoned(3))])
    expected = clean.engine.forward_backward([job("ill", request(1)), job("well", request(2))])
    assert isinstance(outcomes[2], NonFiniteError)
    assert "data[0]" in str(outcomes[2])
    for found, wanted in zip(outcomes, expected, strict=False):
        assert_close(torch.cat(logprobs(found)), torch.cat(logprobs(wanted)))
    for key in ("ill", "well"):
        assert shop.pool.get(key).pending
        assert_close(shop.pool.get(key).grad, clean.pool.get(key).grad)


def test_a_run_whose_only_command_is_poisoned_keeps_its_gradient_bit_for_bit() -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    shop.engine.forward_backward([job("run", poisoned(0))])
    assert not adapter.pending
    assert adapter.grad.abs().max() == 0
    shop.engine.forward_backward([job("run", request(1))])
    before = adapter.grad.clone()
    outcome = shop.engine.forward_backward([job("run", poisoned(2))])[0]
    assert isinstance(outcome, NonFiniteError)
    assert adapter.pending
    assert torch.equal(adapter.grad, before)


def test_a_gradient_that_overflows_fails_the_command_that_made_it() -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    huge = request(0, (6,), "dro")
    for name in ("advantages", "weights"):
        huge.data[0].loss_fn_inputs[name].to_numpy()[:] = 1.0
    huge.data[0].loss_fn_inputs["advantages"].to_numpy()[:] = 1e38
    huge.data[0].loss_fn_inputs["logprobs"].to_numpy()[:] = 0.0
    huge.data[0].loss_fn_inputs["weights"].to_numpy()[1:] = 0.0
    huge.data[0].loss_fn_inputs["weights"].to_numpy()[0] = 0.1
    good, bad = shop.engine.forward_backward([job("run", request(1)), job("run", huge)])
    assert isinstance(bad, NonFiniteError)
    assert "gradient" in str(bad)
    together = adapter.grad.clone()
    adapter.grad.zero_()
    shop.engine.forward_backward([job("run", request(1))])
    assert_close(together, adapter.grad)
    assert succeeded(good)


def test_an_invalid_command_fails_alone() -> None:
    shop = Workshop(tiny_qwen3())
    shop.add("run", AdapterSpec(rank=4))
    beyond = request(0)
    beyond.data.append(Datum(ModelInput.from_ints([97]), {"target_tokens": [1]}))  # pyright: ignore[reportArgumentType]
    outcomes = shop.engine.forward_backward(
        [job("run", beyond), job("run", request(1)), job("nobody", request(2)), job("run", request(3, loss_fn="sft"))]
    )
    assert [type(outcome) for outcome in outcomes] == [
        InvalidRequestError,
        type(succeeded(outcomes[1])),
        NotFoundError,
        InvalidRequestError,
    ]
    steps = shop.engine.optim_step([("run", AdamParams(beta1=1.0)), ("nobody", AdamParams()), ("run", AdamParams())])
    assert [isinstance(step, LorryError) for step in steps] == [True, True, False]


@pytest.fixture
def limit_tokens(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[int]]:
    """Lets memory run out in passes of more than some number of tokens; returns the sizes that were tried."""

    def limit(tokens: int, error: BaseException) -> list[int]:
        tried: list[int] = []
        score = OutputHead.score

        def scarce(self: OutputHead, hidden: Tensor, *args: Any, **options: Any) -> Any:
            tried.append(len(hidden))
            scores = score(self, hidden, *args, **options)
            if len(hidden) > tokens:
                raise error
            return scores

        monkeypatch.setattr(OutputHead, "score", scarce)
        return tried

    return limit


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", ERRORS, ids=["device", "host"])
def test_out_of_memory_halves_the_pass_and_gives_the_same(
    error: BaseException, limit_tokens: Callable[[int, BaseException], list[int]]
) -> None:
    shop, ample = Workshop(tiny_qwen3()), Workshop(tiny_qwen3())
    jobs = [job(str(i), request(i, (8, 4, 8))) for i in range(3)]
    for each in (shop, ample):
        for i in range(3):
            each.add(str(i), AdapterSpec(rank=4, seed=i))
        each.engine.forward_backward([job("0", request(9))])
    expected = ample.engine.forward_backward(jobs)
    tried = limit_tokens(20, error)
    outcomes = shop.engine.forward_backward(jobs)
    assert tried[0] == 60
    assert max(tried[-3:]) <= 20
    for found, wanted in zip(outcomes, expected, strict=True):
        assert_close(torch.cat(logprobs(found)), torch.cat(logprobs(wanted)))
    for i in range(3):
        assert_close(shop.pool.get(str(i)).grad, ample.pool.get(str(i)).grad)


def test_only_the_command_that_does_not_fit_alone_fails(
    limit_tokens: Callable[[int, BaseException], list[int]],
) -> None:
    shop = Workshop(tiny_qwen3())
    for key in ("long", "short"):
        shop.add(key, AdapterSpec(rank=4))
    limit_tokens(20, ERRORS[0])
    long, short = shop.engine.forward_backward([job("long", request(0, (5, 30))), job("short", request(1, (9, 9)))])
    assert isinstance(long, OutOfMemoryError)
    assert "30 tokens" in str(long)
    assert succeeded(short)
    assert not shop.pool.get("long").pending
    assert shop.pool.get("long").grad.abs().max() == 0
    assert shop.pool.get("short").pending


def test_an_unforeseen_error_leaves_every_gradient_as_it_was(
    limit_tokens: Callable[[int, BaseException], list[int]],
) -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    shop.engine.forward_backward([job("run", request(0))])
    before = adapter.grad.clone()
    limit_tokens(0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        shop.engine.forward_backward([job("run", request(1))])
    assert torch.equal(adapter.grad, before)
    assert not shop.base.in_flight.segments


def test_a_bfloat16_base_trains_float32_adapters() -> None:
    exact, coarse = (
        Workshop(tiny_qwen3(initializer_range=0.05)),
        Workshop(tiny_qwen3(initializer_range=0.05).bfloat16()),
    )
    for shop in (exact, coarse):
        for i in range(2):
            shop.add(str(i), AdapterSpec(rank=4 + i, seed=i))
        outcomes = shop.engine.forward_backward([job(str(i), request(i, (12, 7))) for i in range(2)])
        assert all(succeeded(outcome) for outcome in outcomes)
    for key in ("0", "1"):
        found, expected = coarse.pool.get(key), exact.pool.get(key)
        assert found.grad.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found.grad, expected.grad, dim=0) > 0.99
        torch.testing.assert_close(found.grad.norm(), expected.grad.norm(), rtol=0.05, atol=0)
    coarse.engine.optim_step([("0", AdamParams(learning_rate=1e-2))])
    stepped = coarse.pool.get("0")
    torch.testing.assert_close(stepped.compute, stepped.weights.bfloat16())


def test_in_bfloat16_a_run_computes_the_same_alone_and_in_company() -> None:
    shop = Workshop(tiny_qwen3(initializer_range=0.05).bfloat16())
    for i in range(4):
        shop.add(str(i), AdapterSpec(rank=2 + i, seed=i))
    jobs = [job(str(i), request(i, (4, 11, 3))) for i in range(4)]
    together = shop.engine.forward_backward(jobs)
    for one, in_company in zip(jobs, together, strict=True):
        (alone,) = shop.engine.forward_backward([one])
        for found, expected in zip(logprobs(in_company), logprobs(alone), strict=True):
            # Among ranks what each computed is rounded, too, before it is summed.
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * chosen_ranks[0])


def test_beside_others_there_are_more_pauses_and_the_same_comes_of_it() -> None:
    pauses: list[int] = []
    grads: list[torch.Tensor] = []
    for beside_others in (False, True):
        workshop = Workshop(tiny_qwen3())
        adapter = workshop.add("run", AdapterSpec(4, seed=1))
        pauses.append(0)

        def pause() -> None:
            pauses[-1] += 1

        workshop.base.in_flight.on_pause, workshop.base.in_flight.beside_others = pause, beside_others
        succeeded(workshop.engine.forward_backward([job("run", request(3, lengths=[100] * 6))])[0])
        grads.append(adapter.grad)
    assert pauses[1] > pauses[0] > 0
    assert_close(grads[1], grads[0])
