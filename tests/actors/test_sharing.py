"""A command that several actors execute, as they execute it: its run has what one would have computed alone."""

from collections.abc import Sequence
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.adapters.behind import SnapshotPolicy
from lorry.actors.adapters.residents import Residents
from lorry.actors.adapters.shares import PartResult, merged
from lorry.actors.adapters.tensors import read_tensors, write_tensors
from lorry.actors.pace import Pace
from lorry.actors.training.sharing import chosen_for
from lorry.actors.training.trainer import Trainer
from lorry.wire.actor_messages import AdapterState, Item, Outcome, Share
from lorry.wire.codec import decode, encode
from lorry.wire.commands import CommandKind, OptimStepInput
from lorry.wire.errors import CheckpointError
from lorry.wire.ids import FutureId
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig

from .models import tiny_qwen3
from .workshop import Workshop, assert_close, request

LORA = LoraConfig(rank=4, seed=1)
STEP = encode(OptimStepInput(AdamParams(learning_rate=0.01)))
NEVER = SnapshotPolicy(float("inf"), float("inf"))
LENGTHS = (5, 9, 3, 12, 7, 30, 2, 8)


class OneActor:
    def __init__(self) -> None:
        self.shop = Workshop(tiny_qwen3())
        self.residents = Residents(self.shop.targets, self.shop.pool, 2**40, NEVER, lambda _: None)
        self.trainer = Trainer(self.shop.engine, self.residents, self.shop.targets, "tiny")

    def do(
        self, kind: CommandKind, payload: bytes = b"", share: Share | None = None, of: AdapterState | None = None
    ) -> tuple[Outcome, bytes]:
        item = Item(FutureId("future"), kind, of or AdapterState("run", LORA), share=share)
        end = self.trainer.run([(item, payload)])[FutureId("future")]
        if isinstance(end, tuple):
            return end
        saved = end.write()
        self.trainer.written(saved)
        return saved.outcome, b""

    def learn(self, *seeds: int) -> None:
        for seed in seeds:
            assert self.do("forward_backward", encode(request(seed)))[0].error is None
            assert self.do("optim_step", STEP)[0].error is None

    @property
    def grad(self) -> torch.Tensor:
        return self.shop.pool.get("run").grad


class Three:
    """A home and two who lend themselves to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.actors = folder, [OneActor() for _ in range(3)]
        self.home = self.actors[0]
        self.parts = [str(folder / f"part-{i}") for i in range(3)]

    def publish(self, version: str = "weights") -> str:
        weights = str(self.folder / version)
        outcome, _ = self.home.do("forward_backward", share=Share("publish", [weights]))
        assert outcome.error is None and not outcome.train_tokens
        return weights

    def compute(self, payload: bytes, weights: str, kind: CommandKind = "forward_backward") -> list[Outcome]:
        of = AdapterState("run/part", LORA, weights)
        shares = [Share("part", [self.parts[i]], i, 3) for i in range(3)]
        return [self.actors[i].do(kind, payload, shares[i], of)[0] for i in range(3)]

    def gather(self, kind: CommandKind = "forward_backward") -> tuple[Outcome, bytes]:
        return self.home.do(kind, share=Share("gather", self.parts))


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_three_actors_find_what_one_does(tmp_path: Path, loss_fn: str) -> None:
    three, alone = Three(tmp_path), OneActor()
    for each in (three.home, alone):
        each.learn(1, 2)
        each.do("forward_backward", encode(request(3)))
    payload = encode(request(4, LENGTHS, loss_fn))
    expected, content = alone.do("forward_backward", payload)
    outcomes = three.compute(payload, three.publish())
    assert [outcome.error for outcome in outcomes] == [None] * 3
    found, result = three.gather()
    assert found == expected, "tokens count once"
    wanted, got = decode(content, ForwardBackwardOutput), decode(result, ForwardBackwardOutput)
    assert got.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
    for ours, theirs in zip(got.loss_fn_outputs, wanted.loss_fn_outputs, strict=True):
        assert_close(ours["logprobs"].to_torch(), theirs["logprobs"].to_torch())
    assert_close(three.home.grad, alone.grad)
    for each in (three.home, alone):
        each.learn(5)
    assert_close(three.home.shop.pool.get("run").weights, alone.shop.pool.get("run").weights)


def test_a_forward_is_shared_and_leaves_no_gradient(tmp_path: Path) -> None:
    three, alone = Three(tmp_path), OneActor()
    payload = encode(request(4, LENGTHS))
    expected, content = alone.do("forward", payload)
    three.compute(payload, three.publish(), "forward")
    found, result = three.gather("forward")
    assert found == expected
    wanted, got = decode(content, ForwardBackwardOutput), decode(result, ForwardBackwardOutput)
    assert got.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
    assert not three.home.shop.pool.get("run").pending


def test_the_next_part_is_computed_with_the_next_weights_and_without_the_last_gradient(tmp_path: Path) -> None:
    three, alone = Three(tmp_path), OneActor()
    for round_ in (1, 2):
        payload = encode(request(round_, LENGTHS))
        alone.do("forward_backward", payload)
        three.compute(payload, three.publish(f"weights-{round_}"))
        three.gather()
        assert_close(three.home.grad, alone.grad)
        for each in (three.home, alone):
            each.do("optim_step", STEP)
        for part in three.parts:
            rmtree(part)


def test_fewer_data_than_actors_leave_some_with_nothing_to_do(tmp_path: Path) -> None:
    three, alone = Three(tmp_path), OneActor()
    payload = encode(request(4, (6,)))
    alone.do("forward_backward", payload)
    assert [outcome.train_tokens for outcome in three.compute(payload, three.publish())] == [6, 0, 0]
    assert three.gather()[0].train_tokens == 6
    assert_close(three.home.grad, alone.grad)


def test_what_cannot_be_gathered_changes_nothing(tmp_path: Path) -> None:
    three = Three(tmp_path)
    three.home.learn(1)
    three.home.do("forward_backward", encode(request(2)))
    before = three.home.grad.clone()
    three.compute(encode(request(4, LENGTHS)), three.publish())
    whole = copytree(three.parts[2], tmp_path / "kept")
    gradient = Path(three.parts[2]) / "gradient.safetensors"

    def damaged() -> None:
        gradient.write_bytes(gradient.read_bytes()[:-8] + b"changed!")

    def another() -> None:
        rmtree(three.parts[2])
        copytree(three.parts[1], three.parts[2])

    for spoil in (damaged, another, lambda: rmtree(three.parts[2])):
        spoil()
        outcome, _ = three.gather()
        assert outcome.error is not None and outcome.error.code == "CheckpointError", outcome
        assert not outcome.unrestored, "the run is as it was"
        assert torch.equal(three.home.grad, before)
        rmtree(three.parts[2], ignore_errors=True)
        copytree(whole, three.parts[2])
    assert three.gather()[0].error is None


def test_a_sum_of_gradients_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    from lorry.actors.adapters.folders import seal

    three = Three(tmp_path)
    three.compute(encode(request(4, LENGTHS)), three.publish())
    for part in map(Path, three.parts[:2]):
        gradient = read_tensors(part / "gradient.safetensors")["gradient"]
        write_tensors(part / "gradient.safetensors", {"gradient": torch.full_like(gradient, 3e38)})
        (part / "checksums.json").unlink()
        seal(part)
    outcome, _ = three.gather()
    assert outcome.error is not None and outcome.error.code == "NonFiniteError"
    assert not three.home.grad.any() and not three.home.shop.pool.get("run").pending


def test_weights_that_are_gone_or_do_not_fit_fail_the_part_alone(tmp_path: Path) -> None:
    three = Three(tmp_path)
    payload = encode(request(4, LENGTHS))
    for spoil in (lambda weights: rmtree(weights), lambda _: None):
        weights = three.publish()
        spoil(weights)
        lora = LORA if not Path(weights).exists() else LoraConfig(rank=8, seed=1)
        outcome, _ = three.actors[1].do(
            "forward_backward",
            payload,
            Share("part", [three.parts[1]], 1, 3),
            AdapterState("other/part", lora, weights),
        )
        assert outcome.error is not None and outcome.error.code == "CheckpointError"
        assert not outcome.unrestored


def test_what_is_wrong_with_a_datum_fails_its_part_and_the_copy_goes_on(tmp_path: Path) -> None:
    three, alone = Three(tmp_path), OneActor()
    bad = request(4, LENGTHS)
    tokens = [10**6, *bad.data[5].model_input.to_ints()[1:]]
    bad.data[5] = Datum(ModelInput.from_ints(tokens), bad.data[5].loss_fn_inputs)
    weights = three.publish()
    assert sum(outcome.error is not None for outcome in three.compute(encode(bad), weights)) == 1
    payload = encode(request(6, LENGTHS))
    alone.do("forward_backward", payload)
    for part in three.parts:
        rmtree(part, ignore_errors=True)
    three.compute(payload, weights)
    three.gather()
    assert_close(three.home.grad, alone.grad)


def test_a_folder_that_cannot_be_written_is_said_to_be_so(tmp_path: Path) -> None:
    three = Three(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    for share in (Share("publish", [str(tmp_path / "file" / "weights")]),):
        outcome, _ = three.home.do("forward_backward", share=share)
        assert outcome.error is not None and outcome.error.code == "StorageError"
        assert three.home.trainer.copies == 0


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 8))
def test_every_datum_is_in_one_part_and_parts_are_alike(lengths: Sequence[int], parts: int) -> None:
    data = [Datum(ModelInput.from_ints([1] * length), {}) for length in lengths]
    chosen = [chosen_for(data, i, parts) for i in range(parts)]
    assert sorted(i for part in chosen for i in part) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in part) for part in chosen]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_parts_that_are_not_each_datum_once_are_not_a_result() -> None:
    def result(*chosen: int) -> PartResult:
        return PartResult(list(chosen), ForwardBackwardOutput("x", [{} for _ in chosen], {}), 1)

    assert len(merged([result(0, 2), result(1)]).loss_fn_outputs) == 3
    for parts in ([result(0, 1), result(1)], [result(0), result(2)]):
        with pytest.raises(CheckpointError, match="not each of its data once"):
            merged(parts)


def test_an_actors_pace_is_that_of_its_last_passes() -> None:
    pace = Pace(least_tokens=10)
    assert pace.tokens_per_s == 0
    for tokens in (0, 9):
        pace.measured(tokens, 1.0)
        assert pace.tokens_per_s == 0
    for _ in range(40):
        pace.measured(100, 1.0)
    assert pace.tokens_per_s == pytest.approx(100)
    for _ in range(10):
        pace.measured(400, 1.0)
    assert pace.tokens_per_s > 380
