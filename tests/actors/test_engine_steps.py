"""Optimizer steps of many runs together: what fails costs its own run a gradient at the most."""

from typing import Any

import pytest
import torch

from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training import adam
from lorry.wire.errors import LorryError, NonFiniteError, OutOfMemoryError
from lorry.wire.types import AdamParams, OptimStepResponse

from .models import tiny_qwen3
from .workshop import Workshop, job, request, succeeded


def test_a_step_that_would_not_be_finite_drops_its_gradient_and_says_so() -> None:
    shop = Workshop(tiny_qwen3())
    for key in ("ill", "well"):
        shop.add(key, AdapterSpec(rank=4))
    shop.engine.forward_backward([job(key, request(0)) for key in ("ill", "well")])
    ill = shop.pool.get("ill")
    before = [vector.clone() for vector in (ill.weights, ill.exp_avg, ill.exp_avg_sq)]
    outcomes = shop.engine.optim_step([("ill", AdamParams(learning_rate=1e39)), ("well", AdamParams())])
    assert isinstance(outcomes[0], NonFiniteError)
    assert "its pending gradient was discarded; weights and moments are as they were" in str(outcomes[0])
    for vector, old in zip((ill.weights, ill.exp_avg, ill.exp_avg_sq), before, strict=True):
        assert torch.equal(vector, old)
    assert (ill.step, ill.pending) == (0, False)
    assert ill.grad.abs().max() == 0
    assert shop.pool.get("well").step == 1


def test_a_ratio_of_e_to_the_55_costs_one_step_and_with_a_clip_none() -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    wild = request(1, (6,), "importance_sampling")
    wild.data[0].loss_fn_inputs["weights"].to_numpy()[3] = 1.0
    wild.data[0].loss_fn_inputs["logprobs"].to_numpy()[3] = -60.0
    for params, stepped in ((AdamParams(), 0), (AdamParams(grad_clip_norm=1.0), 1)):
        succeeded(shop.engine.forward_backward([job("run", wild)])[0])
        (outcome,) = shop.engine.optim_step([("run", params)])
        assert isinstance(outcome, LorryError) == (not stepped)
        assert adapter.step == stepped
    succeeded(shop.engine.forward_backward([job("run", request(2))])[0])
    assert not isinstance(shop.engine.optim_step([("run", AdamParams())])[0], LorryError)
    assert adapter.step == 2


@pytest.mark.parametrize("together", [1, 1 << 20], ids=["one by one", "all at once"])
def test_a_step_that_does_not_fit_into_memory_keeps_its_gradient_and_the_others_step_once(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tiny_qwen3())
    small, large = (shop.add(key, AdapterSpec(rank=rank)) for key, rank in (("small", 2), ("large", 8)))
    ill = shop.add("ill", AdapterSpec(rank=3))
    shop.engine.forward_backward([job(key, request(0)) for key in ("ill", "small", "large")])
    ill.grad[0] = float("inf")
    before = large.grad.clone()
    monkeypatch.setattr(adam, "_ELEMENTS_AT_ONCE", together)
    updates = adam._updates

    def scarce(adapters: Any, *rest: Any) -> Any:
        if any(adapter.spec.rank == large.spec.rank for adapter in adapters):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return updates(adapters, *rest)

    monkeypatch.setattr(adam, "_updates", scarce)
    steps = shop.engine.optim_step([(key, AdamParams()) for key in ("ill", "small", "large")])
    assert isinstance(steps[0], NonFiniteError)
    assert isinstance(steps[1], OptimStepResponse) and steps[1].metrics["grad_norm"] > 0
    assert isinstance(steps[2], OutOfMemoryError)
    assert "gradient still waits for the next one" in str(steps[2])
    assert (small.step, large.step, large.pending) == (1, 0, True)
    assert torch.equal(large.grad, before)


def test_a_step_without_a_pending_gradient_changes_nothing() -> None:
    shop = Workshop(tiny_qwen3())
    adapter = shop.add("run", AdapterSpec(rank=4))
    shop.engine.forward_backward([job("run", request(0))])
    shop.engine.optim_step([("run", AdamParams())])
    before = adapter.weights.clone()
    shop.engine.optim_step([("run", AdamParams(learning_rate=1.0, weight_decay=0.5))])
    assert adapter.step == 1
    assert torch.equal(adapter.weights, before)
