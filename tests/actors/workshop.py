"""Runs, data and an engine on a tiny model, for tests of the training half."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.engine import Engine, ForwardBackwardJob, ForwardBackwardOutcome
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, ForwardBackwardOutput, TensorData

from .placing import chosen_ranks, placed

VOCAB = 97


class Workshop:
    """An engine, its pool, and adapters added by key. B is made random, since a zero B hides half of the gradient."""

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 8,
        token_budget: int = 8192,
        base: Callable[[PreTrainedModel], BaseModel] = wrap_model,
    ) -> None:
        self.base, self.targets = placed(base(model))
        self.pool = AdapterPool(slots, self.base.device)
        self.engine = Engine(self.base, self.targets, self.pool, token_budget=token_budget, logits_bytes=4 * VOCAB * 11)

    def add(self, key: str, spec: AdapterSpec) -> Adapter:
        adapter = self.targets.new_adapter(spec, self.base.device)
        generator = torch.Generator().manual_seed(spec.seed + 1000)
        for _, b in adapter.module_weights().values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
        adapter.refresh()
        self.pool.add(key, adapter)
        return adapter


def job(key: str, request: ForwardBackwardInput, backward: bool = True) -> ForwardBackwardJob:
    return ForwardBackwardJob(key, request, backward)


def request(
    seed: int,
    lengths: Sequence[int] = (5, 9),
    loss_fn: str = "cross_entropy",
    candidates: int | None = None,
    **config: float,
) -> ForwardBackwardInput:
    """Random data for any loss; `candidates` K gives targets of [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    return ForwardBackwardInput([_datum(n, loss_fn, candidates, generator) for n in lengths], loss_fn, config)


def _datum(length: int, loss_fn: str, candidates: int | None, generator: torch.Generator) -> Datum:
    shape = (length,) if candidates is None else (length, candidates)
    inputs = {
        "target_tokens": torch.randint(0, VOCAB, shape, generator=generator),
        "weights": torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.2),
    }
    if loss_fn != "cross_entropy":
        inputs["logprobs"] = -torch.rand(shape, generator=generator) * 8
        inputs["advantages"] = torch.randn(shape, generator=generator)
    if loss_fn == "gspo":
        inputs["logprobs"] -= 4  # the untrained model's logprobs are near log(1 / VOCAB): some ratios are not clipped
        inputs["sequence_ratio_mask"] = (torch.rand(shape, generator=generator) > 0.3).float()
        inputs["sequence_ratio_mask"][-1] = 1
    tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
    return Datum(ModelInput.from_ints(tokens), {name: TensorData.from_torch(t) for name, t in inputs.items()})


def succeeded(outcome: ForwardBackwardOutcome) -> ForwardBackwardOutput:
    assert isinstance(outcome, ForwardBackwardOutput), outcome
    return outcome


def logprobs(outcome: ForwardBackwardOutcome) -> list[torch.Tensor]:
    return [output["logprobs"].to_torch() for output in succeeded(outcome).loss_fn_outputs]


def assert_agrees(model: Any, shop: Workshop) -> None:
    """A model of transformers' or PEFT's gives the logprobs of the shop's adapter "run"."""
    data = request(5)
    ours = logprobs(shop.engine.forward_backward([job("run", data, backward=False)])[0])
    for datum, expected in zip(data.data, ours, strict=True):
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()[:, None]
        with torch.no_grad():
            logits = model(torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
        assert_close(logits.log_softmax(-1).gather(1, targets)[:, 0], expected)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the greatest expected magnitude: small elements are differences of large ones. Among ranks twice
    that, since what they computed is summed in another order."""
    tolerance = 1e-5 if chosen_ranks[0] == 1 else 2e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().clamp(min=1e-3).item())


Family = Callable[[], PreTrainedModel]
