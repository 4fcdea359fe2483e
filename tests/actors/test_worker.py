"""The compute thread with a real engine and decoder on a tiny model: the orders it takes, the outcomes it posts."""

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from lorry.actors.adapters.behind import SnapshotPolicy
from lorry.actors.adapters.checkpoints import load_sampler_weights, save_sampler_weights
from lorry.actors.adapters.residents import Residents
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.base_model import BaseModel
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.model.survey import survey
from lorry.actors.orders import Leave, Sample, Stop, Train
from lorry.actors.outbox import Outbox
from lorry.actors.progress import Progress
from lorry.actors.sampling.decoder import BLOCK_TOKENS, Decoder
from lorry.actors.training.trainer import COPIES_AT_ONCE, Trainer
from lorry.actors.worker import Job, Worker
from lorry.wire.actor_messages import (
    ActorLeft,
    AdapterState,
    CancelCommand,
    Completion,
    FromActor,
    Item,
    MicroBatch,
    Outcome,
    SnapshotTaken,
)
from lorry.wire.codec import encode
from lorry.wire.commands import SampleInput
from lorry.wire.ids import BatchId, FutureId
from lorry.wire.model_input import ModelInput
from lorry.wire.types import LoraConfig, SamplingParams

from .models import tiny_qwen3
from .test_decoder import Letters
from .workshop import Workshop, assert_close, request

PROMPT = [(5 * i + 1) % 90 for i in range(40)]
MARK = 95


class Desk:
    """A worker at work, and what it posted."""

    def __init__(
        self,
        folder: Path,
        slots: int = 8,
        host_bytes: int = 2**40,
        policy: SnapshotPolicy | None = None,
        workshop: Workshop | None = None,
    ) -> None:
        workshop = workshop or Workshop(tiny_qwen3(), slots)
        self.pool, self.in_flight = workshop.pool, workshop.base.in_flight
        self.base = base = workshop.base
        targets = workshop.targets
        self.targets = targets
        for name in ("one", "two"):
            adapter = targets.new_adapter(AdapterSpec(rank=4), base.device)
            save_sampler_weights(adapter, targets, folder / name, "tiny")
        self.folder = folder
        self.posted: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.has_left = False
        self.decoder = Decoder(base, Letters(), 4, 32, 12 * BLOCK_TOKENS * survey(base).token_bytes)
        self.told: list[str] = []
        self.seqs: dict[str, int] = {}
        outbox, policy = Outbox(), SnapshotPolicy(inf, inf) if policy is None else policy
        residents = Residents(
            targets, workshop.pool, host_bytes, policy, lambda m: outbox.keeps(m.run, m) or self.post(m)
        )
        trainer = Trainer(workshop.engine, residents, targets, "tiny")
        self.worker = Worker(
            workshop.engine,
            self.decoder,
            residents,
            trainer,
            0.5,
            self.post,
            self.jobs.put,
            Progress(60),
            Progress(0),
            outbox,
        )
        self.thread = Thread(target=self.worker.run)
        self.thread.start()

    def post(self, message: FromActor, payloads: Sequence[bytes] = ()) -> None:
        if isinstance(message, Completion):
            self.told += [outcome.future for outcome in message.outcomes]
            self.posted.put(message)
        elif isinstance(message, SnapshotTaken):
            self.told.append(f"{message.run} up to {message.seq}")
        self.has_left = self.has_left or isinstance(message, ActorLeft)

    def sample(
        self,
        future: str,
        adapter: str | None,
        new: int = 5,
        scope: str | None = None,
        prompt: Sequence[int] | ModelInput = PROMPT,
    ) -> None:
        state = (
            AdapterState(str(self.folder / adapter), LoraConfig(rank=4), str(self.folder / adapter))
            if adapter
            else None
        )
        tokens = prompt if isinstance(prompt, ModelInput) else ModelInput.from_ints(prompt)
        payload = encode(SampleInput(tokens, 1, SamplingParams(max_tokens=new, stop=[])))
        self.worker.orders.put(Sample(BatchId(1), Item(FutureId(future), "sample", state, scope=scope), payload))

    def state(self, run: str) -> AdapterState:
        return AdapterState(run, LoraConfig(rank=4, seed=1), snapshot=str(self.folder / f"snapshot of {run}"))

    def next_seq(self, run: str) -> int:
        self.seqs[run] = self.seqs.get(run, -1) + 1
        return self.seqs[run]

    def train(self, future: str, rows: int, run: str = "run") -> None:
        """One forward_backward of rows of 100 tokens, 81 of which fill a pass where nobody decodes."""
        item = Item(FutureId(future), "forward_backward", self.state(run), seq=self.next_seq(run))
        payload = encode(request(7, lengths=[100] * rows))
        self.worker.orders.put(Train(MicroBatch(BatchId(2), "train", [item], 100 * rows), [payload]))

    def save(self, future: str, name: str, run: str = "run") -> None:
        folder, seq = str(self.folder / name), self.next_seq(run)
        item = Item(FutureId(future), "save_weights_for_sampler", self.state(run), folder, seq=seq)
        self.worker.orders.put(Train(MicroBatch(BatchId(3), "train", [item], 1), [b""]))

    def write(self) -> None:
        """What is to be written next beside the worker, as the actor's other thread does it."""
        self.worker.orders.put(self.jobs.get()())

    def next_outcome(self) -> Outcome:
        """One in a completion, of which some have none."""
        while not (outcomes := self.posted.get().outcomes):
            pass
        return outcomes[0]

    def until_idle(self) -> None:
        """All that was ordered before has been done."""
        for number in range(2):  # what comes together runs together, and is told before its saves are written
            self.train(f"idle {number}", rows=1, run="idle")
            self.until(f"idle {number}")

    def until(self, future: str) -> list[str]:
        futures: list[str] = []
        while not futures or futures[-1] != future:
            futures += [outcome.future for outcome in self.posted.get().outcomes]
        return futures

    def in_mid_pass(self, *orders: Callable[[], None]) -> None:
        """Each is given in a pause of its own between the products of the next pass, from the first pause on."""
        waiting, pause = list(orders), self.in_flight.on_pause

        def give_and_pause() -> None:
            if waiting:
                waiting.pop(0)()
            pause()

        self.in_flight.on_pause = give_and_pause


@contextmanager
def started(desk: Desk) -> Iterator[Desk]:
    try:
        yield desk
    finally:
        desk.worker.orders.put(Stop())
        desk.thread.join()


@pytest.fixture
def desk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Desk]:
    with started(Desk(tmp_path, getattr(request, "param", 8))) as desk:
        yield desk


def test_a_prefix_is_found_by_the_same_sampler_weights_and_by_no_others(desk: Desk) -> None:
    found = []
    for future, adapter in (("a", "one"), ("b", "one"), ("c", "two"), ("d", None), ("e", None)):
        desk.sample(future, adapter)
        outcome = desk.next_outcome()
        assert (outcome.future, outcome.error, outcome.prefill_tokens) == (future, None, len(PROMPT))
        found.append(outcome.cached_prefill_tokens)
    assert found == [0, 32, 0, 0, 0]


def test_of_the_bare_base_a_prefix_is_found_within_its_scope_alone(desk: Desk) -> None:
    found = []
    for future, scope in (("a", "alice"), ("b", "alice"), ("c", "bob"), ("d", None), ("e", "bob")):
        desk.sample(future, None, scope=scope)
        found.append(desk.next_outcome().cached_prefill_tokens)
    assert found == [0, 32, 0, 0, 32]


def test_sequences_get_their_tokens_between_the_products_of_a_pass(desk: Desk) -> None:
    desk.in_mid_pass(partial(desk.sample, "sample", "one"))
    desk.train("train", rows=60)
    assert [desk.next_outcome().future for _ in range(2)] == ["sample", "train"]


@pytest.mark.parametrize("desk", [1], indirect=True)
def test_where_the_slots_are_those_of_the_pass_sequences_wait_for_its_end(desk: Desk) -> None:
    desk.in_mid_pass(partial(desk.sample, "sample", "one"))
    desk.train("train", rows=60)
    outcomes = [desk.next_outcome() for _ in range(2)]
    assert {(outcome.future, outcome.error) for outcome in outcomes} == {("train", None), ("sample", None)}


def test_a_request_is_cancelled_between_the_products_of_a_pass(desk: Desk) -> None:
    cancel = partial(desk.worker.orders.put, CancelCommand(FutureId("sample")))
    desk.in_mid_pass(partial(desk.sample, "sample", "one", new=140), cancel)
    desk.train("train", rows=60)
    outcomes = [desk.next_outcome() for _ in range(2)]
    assert [(outcome.future, outcome.error is None) for outcome in outcomes] == [("sample", False), ("train", True)]


def test_what_is_trained_does_not_depend_on_who_sampled_meanwhile(desk: Desk) -> None:
    for run, company in (("alone", False), ("in company", True)):
        if company:
            desk.sample("sample", "one", new=140)
        desk.train("train", rows=20, run=run)
        while desk.next_outcome().future != "train":
            pass
    desk.worker.orders.put(Stop())
    desk.thread.join()
    alone, company = (desk.pool.get(run).grad for run in ("alone", "in company"))
    assert_close(company, alone)


def test_a_request_that_outgrows_the_cache_fails_alone(desk: Desk) -> None:
    desk.sample("small", None, new=40)
    desk.sample("large", None, new=200)
    outcomes = {outcome.future: outcome for outcome in (desk.next_outcome(), desk.next_outcome())}
    error = outcomes[FutureId("large")].error
    assert error is not None and error.field == "prompt.length + sampling_params.max_tokens"
    assert outcomes[FutureId("small")].error is None


def test_memory_that_runs_out_in_one_request_ends_it_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_states = BaseModel.hidden_states

    def scarce(self: BaseModel, tokens: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        if ((tokens == MARK) & (positions == len(PROMPT))).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states(self, tokens, positions, **options)

    monkeypatch.setattr(BaseModel, "hidden_states", scarce)
    desk.sample("before", "one", new=30)
    desk.sample("ill", "two", prompt=[*PROMPT, MARK])
    desk.sample("after", None, new=30)
    outcomes = {outcome.future: outcome.error for outcome in (desk.next_outcome() for _ in range(3))}
    assert outcomes.pop(FutureId("before")) is None
    assert outcomes.pop(FutureId("after")) is None
    (error,) = outcomes.values()
    assert error is not None and error.code == "OutOfMemoryError"
    assert "token 41 of a sequence of 41" in error.message


def test_an_adapter_that_does_not_fit_beside_others_ends_its_own_requests(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, lacking = Adapter.to, str(desk.folder / "one")

    def scarce(self: Adapter, device: torch.device | str) -> None:
        if lacking in desk.pool and desk.pool.get(lacking) is self:
            raise torch.OutOfMemoryError("CUDA out of memory")
        move(self, device)

    monkeypatch.setattr(Adapter, "to", scarce)
    for future, adapter in (("ill", "one"), ("well", "two"), ("bare", None)):
        desk.sample(future, adapter)
    outcomes = {outcome.future: outcome.error for outcome in (desk.next_outcome() for _ in range(3))}
    assert {future for future, error in outcomes.items() if error is not None} == {"ill"}
    error = outcomes[FutureId("ill")]
    assert error is not None and error.code == "OutOfMemoryError"


def test_a_cancelled_request_gives_its_blocks_to_the_next(desk: Desk) -> None:
    desk.sample("long", "one", new=140)
    desk.worker.orders.put(CancelCommand(FutureId("long")))
    desk.sample("next", "two", new=140)
    assert [desk.next_outcome().future for _ in range(2)] == ["long", "next"]
    desk.worker.orders.put(Stop())
    desk.thread.join()
    assert desk.decoder.pool.free == desk.decoder.pool.blocks


def test_saved_weights_are_sampled_from_before_they_are_on_disk_and_are_told_when_they_are(desk: Desk) -> None:
    desk.save("save", "new")
    desk.train("behind it", rows=1)
    desk.train("another run's", rows=1, run="other")
    assert desk.until("another run's") == ["another run's"]
    desk.sample("sample", "new")
    assert desk.until("sample") == ["sample"]
    assert not (desk.folder / "new").exists()
    desk.write()
    assert desk.until("behind it") == ["save", "behind it"]
    assert (desk.folder / "new").exists()


def test_sampling_from_the_copy_in_memory_and_from_the_folder_is_the_same(desk: Desk, tmp_path: Path) -> None:
    desk.train("train", rows=1)
    desk.save("save", "new")
    desk.write()
    desk.sample("copy", "new")
    desk.until("copy")
    copy = desk.pool.get(str(desk.folder / "new")).weights
    read = load_sampler_weights(desk.targets, desk.folder / "new", "cpu").weights
    assert torch.equal(copy, read)
    desk.train("later", rows=1)
    desk.until("later")
    assert torch.equal(copy, read), "training goes on in vectors of its own"


def test_training_waits_for_the_disk_only_where_many_copies_wait_already(desk: Desk) -> None:
    for number in range(COPIES_AT_ONCE + 1):
        desk.save(f"save {number}", f"new {number}")
    desk.until_idle()
    assert [(desk.folder / f"new {number}").exists() for number in range(3)] == [False, False, True]
    desk.write()
    assert desk.until("save 0") == ["save 0"]
    desk.write()
    assert desk.until("save 2") == ["save 1", "save 2"]


def test_who_leaves_waits_for_the_weights_that_are_written(desk: Desk) -> None:
    desk.save("save", "new")
    desk.worker.orders.put(Leave())
    job = desk.jobs.get()
    assert not desk.has_left
    desk.worker.orders.put(job())
    desk.thread.join()
    assert desk.has_left and desk.until("save") == ["save"]


def test_weights_that_the_disk_refuses_fail_alone(desk: Desk) -> None:
    (desk.folder / "new").mkdir()
    (desk.folder / "new" / "file").touch()
    desk.save("save", "new/file/below")
    desk.train("behind it", rows=1)
    desk.write()
    outcomes = [desk.next_outcome() for _ in range(2)]
    assert outcomes[0].error is not None and outcomes[0].error.code == "StorageError"
    assert outcomes[1].error is None


def test_a_run_that_leaves_memory_after_a_pass_is_told_to_be_saved_after_what_the_pass_did(tmp_path: Path) -> None:
    with started(Desk(tmp_path, host_bytes=1)) as desk:
        desk.train("a", rows=1, run="a")
        desk.train("b", rows=1, run="b")
        desk.until_idle()
    assert desk.told.index("a") < desk.told.index("a up to 0")
    assert desk.told.index("b") < desk.told.index("b up to 0")


def test_a_run_is_saved_while_its_weights_are_written_and_that_is_told_after_them(tmp_path: Path) -> None:
    with started(Desk(tmp_path, policy=SnapshotPolicy(recovery_s=0, idle_s=inf))) as desk:
        desk.save("save", "new")
        desk.train("behind it", rows=1)
        save, snapshot = desk.jobs.get(), desk.jobs.get()
        desk.worker.orders.put(snapshot())
        desk.train("last", rows=1)
        desk.until_idle()
        assert "run up to 1" not in desk.told
        desk.worker.orders.put(save())
        desk.until("last")
    assert [told for told in desk.told if "idle" not in told] == ["save", "behind it", "run up to 1", "last"]


def test_a_disk_that_never_ends_a_save_is_noticed(desk: Desk) -> None:
    desk.save("save", "new")
    desk.until_idle()
    assert desk.worker.saving.hangs_s() is not None
    desk.write()
    desk.until("save")
    assert desk.worker.saving.hangs_s() is None


def test_it_tells_how_much_of_its_memory_is_used_and_whose_the_devices_time_was(desk: Desk) -> None:
    assert (desk.worker.measured.slots_used, desk.worker.measured.cache_blocks) == (0, 12)
    desk.train("one", rows=2)
    trained = desk.next_outcome()
    assert trained.device_s is not None and trained.device_s > 0
    assert desk.worker.measured.slots_used == 1
    desk.sample("two", adapter=None, scope="us", prompt=[5] * (BLOCK_TOKENS + 1))
    assert desk.next_outcome().device_s is None, "it was in steps with others"
    kept = desk.worker.measured
    assert (kept.cache_blocks_held, kept.cache_blocks_kept) == (0, 1)
    assert desk.worker.train_s >= trained.device_s - 1e-6
