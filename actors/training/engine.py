"""Executes the training commands of many runs together on one frozen base model. A fault stays in its own command.

Knows adapters by key, never tenants, order or time: what it is given at once, it may run in any order.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from ...wire.commands import ForwardBackwardInput, check_adam_params
from ...wire.errors import InvalidRequestError, LorryError, NonFiniteError, NotFoundError, OutOfMemoryError
from ...wire.reducing import reduced
from ...wire.types import AdamParams, ForwardBackwardOutput, LossFnOutput, OptimStepResponse, TensorData
from ..adapters.slots import AdapterPool
from ..images.layout import seen_in
from ..model.adapter import Adapter
from ..model.base_model import BaseModel
from ..model.in_flight import Segment
from ..model.lora import LoraTargets
from ..model.memory import memory_ran_out
from ..model.recomputing import ALL
from .adam import adam_step, all_finite
from .batch import Batch, lay_out
from .logprobs import Scores
from .packing import Pass, Row, pack
from .pass_cost import Thrift
from .reading import Readable, read_request
from .training_pass import PassInput, TrainingPass

PASS_TOKENS = 256
"""Of a pass beside others. Products of fewer rows cost more by the row; those of more would let others wait longer."""


@dataclass(frozen=True, slots=True)
class ForwardBackwardJob:
    """One `forward` (`backward` False) or `forward_backward` command of the adapter that the pool knows by this key."""

    adapter: str
    request: ForwardBackwardInput
    backward: bool = True


ForwardBackwardOutcome: TypeAlias = ForwardBackwardOutput | LorryError
OptimStepOutcome: TypeAlias = OptimStepResponse | LorryError


@dataclass(frozen=True, slots=True)
class _Job(Readable):
    """A ForwardBackwardJob that can be run."""

    adapter: str
    backward: bool


@dataclass(slots=True)
class _Tally:
    """What the passes have found for one job so far; `problem` is what is not finite about it."""

    outputs: list[LossFnOutput]
    loss: float = 0.0
    metrics: list[tuple[Mapping[str, float], int]] = field(default_factory=list[tuple[Mapping[str, float], int]])
    problem: str | None = None

    def outcome(self) -> ForwardBackwardOutcome:
        if self.problem is not None:
            return NonFiniteError(self.problem, field="data")
        return ForwardBackwardOutput("ArrayRecord", self.outputs, {"loss:sum": self.loss, **reduced(self.metrics)})

    def count(self, metrics: Mapping[str, float]) -> None:
        """Those of one datum."""
        if metrics:
            self.metrics.append((metrics, 1))


class Engine:
    """`token_budget` bounds the tokens of one pass through the model, unless one datum alone is longer.

    While others wait for the pauses between the products of a pass, passes are kept short.
    """

    def __init__(
        self,
        base: BaseModel,
        targets: LoraTargets,
        pool: AdapterPool,
        *,
        token_budget: int = 8192,
        logits_bytes: int = 64 << 20,
        available: Callable[[], int] | None = None,
    ) -> None:
        """`available` tells how many bytes a pass may hold; without it no layer is computed again but where memory has
        run out."""
        self.base = base
        self.pool = pool
        self.token_budget = token_budget
        self._thrift = None if available is None else Thrift(base, targets, available)
        self._pass = TrainingPass(base, targets, logits_bytes)
        self._lead = base.lead

    def forward_backward(self, jobs: Sequence[ForwardBackwardJob]) -> list[ForwardBackwardOutcome]:
        """Runs all jobs mixed; outcomes in their order. A job that fails leaves its adapter as it was before it.

        The errors among the outcomes: InvalidRequestError, NotFoundError, NonFiniteError, OutOfMemoryError.
        """
        prepared = [self._prepare(job) for job in jobs]
        budget = min(self.token_budget, PASS_TOKENS) if self.base.in_flight.beside_others else self.token_budget
        outcomes = iter(self._attempt([job for job in prepared if isinstance(job, _Job)], budget))
        return [next(outcomes) if isinstance(job, _Job) else job for job in prepared]

    def optim_step(self, steps: Sequence[tuple[str, AdamParams]]) -> list[OptimStepOutcome]:
        """One Adam step for each (adapter, hyperparameters); nothing happens where no gradient is pending.

        The errors among the outcomes: InvalidRequestError, NotFoundError and OutOfMemoryError, with nothing changed;
        and NonFiniteError, with the gradient dropped and all else as it was.
        """
        outcomes: list[OptimStepOutcome] = []
        together: dict[str, AdamParams] = {}
        for key, params in steps:
            if key in together or len(together) == self.pool.slots:
                outcomes += self._step(together)
                together = {}
            together[key] = params
        return outcomes + self._step(together)

    def _prepare(self, job: ForwardBackwardJob) -> _Job | LorryError:
        if job.adapter not in self.pool:
            return _unknown(job.adapter)
        try:
            read = read_request(job.request, self.base)
            return _Job(read.request, read.rows, job.adapter, job.backward)
        except LorryError as error:
            return error

    def _attempt(
        self, jobs: Sequence[_Job], token_budget: int, *, thrifty: bool = False
    ) -> list[ForwardBackwardOutcome]:
        """Runs all jobs in as few passes as fit; what fails is narrowed down, and whoever it pulled down runs again.
        Where it is `thrifty`, every layer is computed again in the backward."""
        passes = [
            (rows, backward)
            for backward in (False, True)
            for rows in pack(_rows(jobs, backward), token_budget, self.pool.slots)
        ]
        tallies = [_Tally([{}] * len(job.request.data)) for job in jobs]
        spoiled = self._transact(jobs, passes, tallies, thrifty=thrifty)
        if spoiled is None and not thrifty and any(backward for _, backward in passes):
            return self._attempt(jobs, token_budget, thrifty=True)
        if spoiled is None:
            return self._attempt_smaller(jobs, [rows for rows, _ in passes])
        again = _innocent(jobs, tallies, spoiled)
        outcomes = [tally.outcome() for tally in tallies]
        for chosen in again:
            for i, outcome in zip(
                chosen, self._attempt([jobs[i] for i in chosen], token_budget, thrifty=thrifty), strict=True
            ):
                outcomes[i] = outcome
        return outcomes

    def _attempt_smaller(self, jobs: Sequence[_Job], passes: Sequence[Pass]) -> list[ForwardBackwardOutcome]:
        """After memory ran out though every layer was computed again: halves the passes; where each is one datum, the
        jobs run one by one."""
        divisible = [rows.tokens for rows in passes if len(rows.rows) > 1]
        if divisible:
            return self._attempt(jobs, max(divisible) // 2, thrifty=True)
        if len(jobs) > 1:
            return [outcome for job in jobs for outcome in self._attempt([job], 1, thrifty=True)]
        longest = max(rows.tokens for rows in passes)
        return [OutOfMemoryError(f"a datum of {longest} tokens does not fit into the actor's memory", field="data")]

    def _transact(
        self, jobs: Sequence[_Job], passes: Sequence[tuple[Pass, bool]], tallies: Sequence[_Tally], *, thrifty: bool
    ) -> set[str] | None:
        """Runs the passes and fills the tallies; None, with every gradient as it was, where memory ran out.

        The adapters it returns are spoiled: a job of theirs is not finite, and their gradients are as they were.
        """
        adapters = {job.adapter: self.pool.get(job.adapter) for job in jobs if job.backward}
        spoiled: set[str] = set()
        try:
            for adapter in adapters.values():
                adapter.mark()
            for rows, backward in passes:
                spoiled |= self._run(rows, backward, jobs, tallies, thrifty=thrifty)
                self.base.in_flight.pause()
        except BaseException as error:
            for adapter in adapters.values():
                adapter.rollback()
            if not memory_ran_out(error):
                raise
            return None
        spoiled |= {job.adapter for job, tally in zip(jobs, tallies, strict=True) if job.backward and tally.problem}
        for key, adapter in adapters.items():
            adapter.rollback() if key in spoiled else adapter.commit()
        return spoiled

    def _run(
        self, rows: Pass, backward: bool, jobs: Sequence[_Job], tallies: Sequence[_Tally], *, thrifty: bool
    ) -> set[str]:
        """One pass through the model, and back; returns the adapters whose gradient is not finite now."""
        segments = rows.segments()
        keys = [key for key, _, _ in segments]
        adapters = self.pool.acquire(keys)
        batch = lay_out(rows, jobs, self.base.device)
        row = PassInput(
            batch.tokens,
            batch.positions,
            [row.length for row in rows.rows],
            [Segment(adapter, start, end) for adapter, (_, start, end) in zip(adapters, segments, strict=True)],
            batch.targets,
            seen_in(batch.stretches, self.base.eyes, self.base.device),
            backward,
            self._layers_again(rows, thrifty) if backward else 0,
        )
        with self.pool.pin(keys):
            scores = self._pass.run(row, batch)
        _record(rows, batch, scores, jobs, tallies)
        if not backward:
            return set()
        for adapter in adapters:
            adapter.pending = True
        return {key for key, ok in zip(keys, self._all_finite(adapters), strict=True) if not ok}

    def _all_finite(self, adapters: Sequence[Adapter]) -> list[bool]:
        return all_finite([a.grad for a in adapters]) if self._lead is None else self._lead.all_finite(adapters)

    def _layers_again(self, rows: Pass, thrifty: bool) -> int:
        if thrifty:
            return ALL
        return 0 if self._thrift is None else self._thrift.layers_again([row.length for row in rows.rows])

    def _adam_step(self, adapters: Sequence[Adapter], params: Sequence[AdamParams]) -> Iterator[float | None]:
        return adam_step(adapters, params) if self._lead is None else self._lead.adam_step(adapters, params)

    def _step(self, steps: dict[str, AdamParams]) -> list[OptimStepOutcome]:
        """Distinct adapters, no more than there are slots."""
        outcomes: dict[str, OptimStepOutcome] = {}
        for key, params in steps.items():
            try:
                check_adam_params(params)
            except InvalidRequestError as error:
                outcomes[key] = error
            if key not in self.pool:
                outcomes[key] = _unknown(key)
            elif key not in outcomes and not self.pool.get(key).pending:
                outcomes[key] = OptimStepResponse({})
        due = [key for key in steps if key not in outcomes]
        try:
            norms = self._adam_step(self.pool.acquire(due), [steps[key] for key in due]) if due else ()
            for key, norm in zip(due, norms, strict=True):
                outcomes[key] = _stepped(norm)
        except (RuntimeError, MemoryError) as error:
            if not memory_ran_out(error):
                raise
        left = [key for key in due if key not in outcomes]
        if len(left) == len(due) == 1:
            problem = (
                "an optimizer step does not fit into the actor's memory; its gradient still waits for the next one"
            )
            outcomes[left[0]] = OutOfMemoryError(problem)
        elif left:
            outcomes |= {key: self._step({key: steps[key]})[0] for key in left}
        return [outcomes[key] for key in steps]


def _rows(jobs: Sequence[_Job], backward: bool) -> list[Row]:
    return [
        Row(i, j, job.adapter, datum.model_input.length)
        for i, job in enumerate(jobs)
        if job.backward == backward
        for j, datum in enumerate(job.request.data)
    ]


def _record(
    rows: Pass,
    batch: Batch,
    scores: Scores,
    jobs: Sequence[_Job],
    tallies: Sequence[_Tally],
) -> None:
    logprobs, losses = scores.logprobs.cpu().numpy(), scores.losses.cpu().numpy()  # [targets] each
    for i, (row, start, end) in enumerate(zip(rows.rows, batch.bounds, batch.bounds[1:], strict=False)):
        tally, found, loss = tallies[row.job], logprobs[start:end], float(losses[start:end].sum(dtype=np.float64))
        if not (math.isfinite(loss) and np.isfinite(found).all()):
            said = f"data[{row.datum}] has a loss of {loss} and logprobs down to {found.min()}"
            tally.problem = batch.found.problems.get(i, said)
        metrics = batch.found.metrics.get(i, {})
        if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
            tally.problem = tally.problem or f"data[{row.datum}] has a metric {wrong[0]} of {metrics[wrong[0]]}"
        tally.count(metrics)
        shape = jobs[row.job].request.data[row.datum].loss_fn_inputs["target_tokens"].shape
        tally.outputs[row.datum] = {"logprobs": TensorData(found.reshape(shape))}
        tally.loss += loss


def _innocent(jobs: Sequence[_Job], tallies: Sequence[_Tally], spoiled: set[str]) -> list[list[int]]:
    """Which jobs of the spoiled adapters to run again, and which of them together.

    Where no job of an adapter has a problem of its own, their gradients have: each runs alone, and one that was
    alone already is the culprit.
    """
    again: list[list[int]] = []
    for key in sorted(spoiled):
        mine = [i for i, job in enumerate(jobs) if job.backward and job.adapter == key]
        good = [i for i in mine if tallies[i].problem is None]
        if len(good) < len(mine):
            again += [good] if good else []
        elif len(mine) > 1:
            again += [[i] for i in mine]
        else:
            tallies[mine[0]].problem = "the gradient is not finite"
    return again


def _stepped(norm: float | None) -> OptimStepOutcome:
    if norm is None:
        problem = (
            "the optimizer's step is not finite: its pending gradient was discarded; weights and moments are as they "
            "were; the run goes on"
        )
        return NonFiniteError(problem, field="adam_params")
    return OptimStepResponse({"grad_norm": norm})


def _unknown(key: str) -> NotFoundError:
    return NotFoundError(f"there is no adapter {key!r} on this actor")
