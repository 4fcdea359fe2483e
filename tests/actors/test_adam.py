import pytest
import torch

from lorry.actors.model.adapter import Adapter, AdapterSpec, Target
from lorry.actors.training import adam
from lorry.actors.training.adam import adam_step
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
        norms = adam_step(adapters, PARAMS)
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
        (AdamParams(eps=0.0), 0.0),
        (AdamParams(learning_rate=1e300), 1.0),
    ],
    ids=["not a number", "infinite", "square overflows", "nothing over nothing", "step overflows"],
)
def test_a_step_that_is_not_finite_leaves_its_run_alone_and_the_others_step(params: AdamParams, grad: float) -> None:
    ill, well = fresh(2), fresh(3)
    give_gradient(ill, 0)
    give_gradient(well, 1)
    ill.grad[5] = grad
    before = [vector.clone() for vector in (ill.weights, ill.grad, ill.exp_avg, ill.exp_avg_sq)]
    norms = adam_step([ill, well], [params, AdamParams()])
    assert norms[0] is None
    assert norms[1] is not None
    after = (ill.weights, ill.grad, ill.exp_avg, ill.exp_avg_sq)
    torch.testing.assert_close(after, tuple(before), rtol=0, atol=0, equal_nan=True)
    assert (ill.step, ill.pending, well.step, well.pending) == (0, True, 1, False)


def test_the_copy_in_the_base_models_dtype_follows_the_weights() -> None:
    adapter = fresh(4, dtype=torch.bfloat16)
    give_gradient(adapter, 0)
    before = adapter.compute.clone()
    adam_step([adapter], [AdamParams(learning_rate=0.1)])
    assert not torch.equal(adapter.compute, before)
    assert torch.equal(adapter.compute, adapter.weights.bfloat16())
