"""What commands of one micro-batch leave of their run, and what their outcomes tell the broker of it."""

from math import inf
from pathlib import Path

import pytest
import torch

from lorry.actors.adapters.behind import SnapshotPolicy
from lorry.actors.adapters.residents import Residents
from lorry.actors.model.adapter import Adapter
from lorry.actors.training.trainer import Trainer
from lorry.wire.actor_messages import AdapterState, Item, Outcome
from lorry.wire.codec import encode
from lorry.wire.commands import CommandKind, OptimStepInput
from lorry.wire.ids import FutureId
from lorry.wire.types import AdamParams, LoraConfig

from .models import tiny_qwen3
from .workshop import Workshop, request

NEVER = SnapshotPolicy(inf, inf)
STEP = encode(OptimStepInput(AdamParams()))
OVERFLOWS = encode(OptimStepInput(AdamParams(learning_rate=1e39)))


class Bench:
    """A trainer and one run."""

    def __init__(self, folder: str | None = None) -> None:
        self.shop = Workshop(tiny_qwen3())
        self.residents = Residents(self.shop.targets, self.shop.pool, 2**40, NEVER, lambda _: None)
        self.trainer = Trainer(self.shop.engine, self.residents, self.shop.targets, "tiny")
        self.state = AdapterState("run", LoraConfig(rank=4, seed=1), folder)

    def do(self, kind: CommandKind, payload: bytes = b"", **options: object) -> Outcome:
        item = Item(FutureId("future"), kind, self.state, **options)  # pyright: ignore[reportArgumentType]
        end = self.trainer.run([(item, payload)])[FutureId("future")]
        return end[0] if isinstance(end, tuple) else end.write().outcome

    def learn(self, seed: int) -> None:
        assert self.do("forward_backward", encode(request(seed))).error is None

    @property
    def adapter(self) -> Adapter:
        return self.shop.pool.get("run")


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.learn(0)
    assert bench.do("optim_step", STEP).error is None
    return bench


def test_a_step_that_is_not_finite_tells_the_broker_that_it_dropped_the_gradient(bench: Bench) -> None:
    bench.learn(1)
    outcome = bench.do("optim_step", OVERFLOWS)
    assert outcome.error is not None and outcome.error.code == "NonFiniteError"
    assert outcome.discarded
    assert (bench.adapter.step, bench.adapter.pending) == (1, False)


def test_a_step_that_was_refused_dropped_nothing(bench: Bench) -> None:
    bench.learn(1)
    outcome = bench.do("optim_step", encode(OptimStepInput(AdamParams(beta1=1.0))))
    assert outcome.error is not None and not outcome.discarded
    assert bench.adapter.pending


def test_the_replay_of_a_step_that_failed_leaves_the_run_where_the_failure_left_it(bench: Bench) -> None:
    replayed = Bench()
    replayed.learn(0)
    replayed.do("optim_step", STEP)
    for each, options in ((bench, {}), (replayed, {"discard": True})):
        each.learn(1)
        outcome = each.do("optim_step", OVERFLOWS, **options)
        assert outcome.discarded
        assert (outcome.error is None) == bool(options)
        each.learn(2)
        assert each.do("optim_step", STEP).error is None
    assert torch.equal(replayed.adapter.weights, bench.adapter.weights)
    assert (replayed.adapter.step, replayed.adapter.pending) == (2, False)


def test_a_loaded_checkpoint_has_no_gradient_pending_and_a_recovered_run_has_its_own(
    bench: Bench, tmp_path: Path
) -> None:
    folder = str(tmp_path / "state")
    bench.learn(1)
    pending = bench.adapter.grad.clone()
    assert bench.do("save_state", folder=folder).error is None
    recovered = Bench(folder)
    assert recovered.do("save_weights_for_sampler", folder=str(tmp_path / "weights")).error is None
    assert (recovered.adapter.step, recovered.adapter.pending) == (1, True)
    assert torch.equal(recovered.adapter.grad, pending)
    for optimizer in (False, True):
        bench.learn(2)
        assert bench.do("load_state", folder=folder, optimizer=optimizer).error is None
        assert (bench.adapter.step, bench.adapter.pending) == (int(optimizer), False)
        assert bench.adapter.grad.abs().max() == 0
