import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.actors.model.adapter import Adapter
from lorry.actors.model.spec import AdapterSpec, Target
from lorry.actors.training import adam
from lorry.actors.training.adam import adam_step, all_finite
from lorry.wire.types import AdamParams

TARGETS = [Target(0, "q_proj", 6, 8, "attn"), Target(1, "up_proj", 6, 10, "mlp")]
PARAMS = [
    AdamParams(),
    AdamParams(learning_rate=1e-2, weight_decay=0.1),
    AdamParams(learning_rate=3e-3, beta1=0.5, beta2=0.999, eps=1e-8, grad_clip_norm=0.3),
    AdamParams(beta1=0.0, grad_clip_norm=1e6),
]


def fresh(rank: int, **options: torch.dtype) -> Adapter:
    return Adapter(AdapterSpec(rank, seed=rank), TARGETS, **options)


def give_gradient(adapter: Adapter, seed: int) -> None:
    adapter.grad.copy_(torch.randn(adapter.size, generator=torch.Generator().manual_seed(seed)))
    adapter.pending = True


@pytest.mark.parametrize("together", [1, 1 << 20], ids=["one by one", "all at once"])
def test_many_runs_at_once_step_as_adamw_does(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "_ELEMENTS_AT_ONCE", together)
    adapters = [fresh(2 + i) for i in range(len(PARAMS))]
    references = [torch.nn.Parameter(adapter.weights.clone()) for adapter in adapters]
    optimizers = [
        torch.optim.AdamW([w], lr=p.learning_rate, betas=(p.beta1, p.beta2), eps=p.eps, weight_decay=p.weight_decay)
        for w, p in zip(references, PARAMS, strict=True)
    ]
    for step in range(4):
        for i, (adapter, reference) in enumerate(zip(adapters, references, strict=True)):
            give_gradient(adapter, 10 * step + i)
            reference.grad = adapter.grad.clone()
        norms = list(adam_step(adapters, PARAMS))
        for reference, optimizer, params, norm in zip(references, optimizers, PARAMS, norms, strict=True):
            limit = params.grad_clip_norm or float("inf")
            expected = torch.nn.utils.clip_grad_norm_([reference], limit)
            assert norm == pytest.approx(expected.item(), rel=1e-5)
            optimizer.step()
        for adapter, reference in zip(adapters, references, strict=True):
            torch.testing.assert_close(adapter.weights, reference.detach(), rtol=1e-5, atol=1e-7)
            assert adapter.grad.abs().max() == 0
            assert (adapter.step, adapter.pending) == (step + 1, False)


@pytest.mark.parametrize(
    ("params", "grad"),
    [
        (AdamParams(), float("nan")),
        (AdamParams(), float("inf")),
        (AdamParams(), 1e30),
        (AdamParams(grad_clip_norm=1.0), float("inf")),
        (AdamParams(eps=0.0), 0.0),
        (AdamParams(learning_rate=1e300), 1.0),
    ],
    ids=[
        "not a number",
        "infinite",
        "square overflows",
        "clipped infinity",
        "nothing over nothing",
        "step overflows",
    ],
)
def test_a_step_that_is_not_finite_drops_its_gradient_and_changes_nothing_else(params: AdamParams, grad: float) -> None:
    ill, well = fresh(2), fresh(3)
    give_gradient(ill, 0)
    give_gradient(well, 1)
    ill.grad[5] = grad
    before = [vector.clone() for vector in (ill.weights, ill.exp_avg, ill.exp_avg_sq)]
    norms = list(adam_step([ill, well], [params, AdamParams()]))
    assert norms[0] is None
    assert norms[1] is not None
    assert all(torch.equal(*pair) for pair in zip((ill.weights, ill.exp_avg, ill.exp_avg_sq), before, strict=True))
    assert ill.grad.abs().max() == 0
    assert (ill.step, ill.pending, well.step, well.pending) == (0, False, 1, False)


def assert_close(found: torch.Tensor, expected: torch.Tensor, of_the_greatest: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=of_the_greatest * expected.abs().max().item())


def unit(seed: int, size: int) -> torch.Tensor:
    direction = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return direction / direction.norm()


@settings(deadline=None, max_examples=60)
@given(
    exponent=st.floats(18, 38),
    limit=st.floats(-12, 6).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 1000),
    earlier=st.booleans(),
)
def test_a_huge_gradient_is_clipped_and_steps_as_its_direction_does(
    exponent: float, limit: float, seed: int, earlier: bool
) -> None:
    huge, plain = fresh(2), fresh(2)
    direction = unit(seed, huge.size)
    for adapter in (huge, plain):
        if earlier:  # moments of an ordinary step
            give_gradient(adapter, 1)
            assert None not in list(adam_step([adapter], [AdamParams()]))
        adapter.pending = True
    huge.grad.copy_(direction * 10**exponent)
    plain.grad.copy_(direction * limit)
    (norm,) = adam_step([huge], [AdamParams(grad_clip_norm=limit)])
    (expected,) = adam_step([plain], [AdamParams()])
    assert norm == pytest.approx(10**exponent, rel=1e-5)
    assert expected == pytest.approx(limit, rel=1e-5)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        assert_close(getattr(huge, name), getattr(plain, name), 1e-5)


@settings(deadline=None, max_examples=30)
@given(exponent=st.floats(23, 38), seed=st.integers(0, 1000))
def test_without_a_clip_a_huge_gradient_is_dropped_and_the_run_goes_on(exponent: float, seed: int) -> None:
    ill, well = fresh(2), fresh(2)
    ill.grad.copy_(unit(seed, ill.size) * 10**exponent)
    ill.pending = True
    assert list(adam_step([ill], [AdamParams()])) == [None]
    assert (ill.step, ill.pending) == (0, False)
    for adapter in (ill, well):
        give_gradient(adapter, seed)
    first, second = adam_step([ill, well], [AdamParams(), AdamParams()])
    assert first == second is not None
    assert torch.equal(ill.weights, well.weights)


def test_elements_that_are_finite_are_so_though_their_sum_is_not() -> None:
    most = torch.finfo(torch.float32).max
    found = all_finite([torch.tensor([most, most]), torch.tensor([most, math.inf]), torch.tensor([1.0, math.nan])])
    assert found == [True, False, False]


def test_the_copy_in_the_base_models_dtype_follows_the_weights() -> None:
    adapter = fresh(4, dtype=torch.bfloat16)
    give_gradient(adapter, 0)
    before = adapter.compute.clone()
    assert None not in list(adam_step([adapter], [AdamParams(learning_rate=0.1)]))
    assert not torch.equal(adapter.compute, before)
    assert torch.equal(adapter.compute, adapter.weights.bfloat16())
