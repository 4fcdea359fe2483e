"""The first half of a command's life: journalled under its seq, accepted or refused, then planned.

A refusal is a command too: it ends its seq, so that those behind it do not wait for it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ..storage.bills import bill
from ..storage.rows import CommandRow, ResultRow, RunRow, UsedSeq
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.client_messages import CommandArguments
from ..wire.codec import encode
from ..wire.commands import SAMPLING_KINDS, CommandKind
from ..wire.errors import ActorLostError, ErrorInfo, LorryError, NotFoundError, SeqConflictError
from ..wire.ids import KeyId, LaneId, ProjectId, TenantId
from .finishing import Finishing
from .observing.stages import Stages
from .open_commands import OpenCommands, planned
from .planning.lanes import Lane
from .planning.limits import Holder, holders_of, month_began
from .planning.planner import Planner
from .recovering import Recovering
from .registry import Registry
from .saves import SAVES, saved_folder
from .telling import told
from .waiters import Waiters

_WORD = {"queued": "not over yet", "done": "done", "failed": "failed", "discarded": "failed"}


@dataclass(frozen=True, slots=True)
class Request:
    """Who sent a command, and how it is answered: with None once it is journalled, with what is wrong otherwise."""

    connection: bytes
    answer: Callable[[LorryError | None], None]


@dataclass(frozen=True, slots=True)
class _Earlier:
    """What was under a seq before, whether it was the same request, and its result where there is one still."""

    used: UsedSeq
    is_same: bool
    result: ResultRow | None


class Accepting:
    def __init__(
        self,
        open_: OpenCommands,
        registry: Registry,
        planner: Planner,
        waiters: Waiters,
        writer: Writer,
        finishing: Finishing,
        recovering: Recovering,
        checkpoints: Path,
        now: Callable[[], float],
        work_arrived: Callable[[], None],
        stages: Stages,
    ) -> None:
        self._stages = stages
        self._open, self._registry, self._planner, self._waiters = open_, registry, planner, waiters
        self._writer, self._finishing, self._recovering = writer, finishing, recovering
        self._checkpoints, self._now, self._work_arrived = checkpoints, now, work_arrived

    def load(self, store: Store) -> None:
        """After a start: every run has a lane, nobody holds its state, and what was queued is queued again."""
        for line in bill(store, ("tenant", "project", "key"), start=month_began(self._now())):
            tenant, project, key = line.of
            holders = holders_of(TenantId(tenant), KeyId(key) or None, ProjectId(project))
            self._open.meters.spent(holders, line.cost, self._now())
        self._open.meters.kept(kept_costs(store, self._now()), self._now())
        finished = store.finished_counts()
        for run in store.runs():
            lane = self.add_run(run)
            self._open.meters.used(holders_of(run.tenant, run.key, run.project), lane.id, run.last_request_at)
            self._planner.lose_state(lane.id)
            self._open.dormant.add(lane.id)
            if lane.id in finished:
                self._registry.begun(lane.id)
            count, top = finished.get(lane.id, (0, run.first_seq - 1))
            # Usually all that is over is one stretch from the first on; after a cancellation there may be gaps.
            if top == run.first_seq + count - 1:
                lane.next_seq = top + 1
            else:
                lane.skip(store.finished_seqs(lane.id))
        for queued in store.queued_commands():
            row = self._with_folder(queued, store)
            self._open.add(row)
            self._registry.saving(row)
            self._registry.begun(row.lane)
            self._waiters.opened(row.future)
            self._plan(row)

    def _with_folder(self, row: CommandRow, store: Store) -> CommandRow:
        """An older release looked names up later, and did not name folders in the journal."""
        run = self._registry.run_of(row.lane)
        if row.folder is not None or run is None or (row.kind not in SAVES and row.kind != "load_state"):
            return row
        try:
            if row.kind == "load_state":
                folder = self._registry.loadable(run, row.arguments.path, row.seq)
            else:
                folder = saved_folder(row, self._checkpoints)
        except LorryError:  # it will fail for want of one
            return row
        with store.transaction():
            store.folder_named(row.future, folder)
        return replace(row, folder=folder)

    def add_run(self, run: RunRow) -> Lane:
        self._registry.add_run(run)
        lane = Lane(LaneId(run.id), run.tenant, run.base_model, next_seq=run.first_seq, priority=run.priority)
        self._planner.add_lane(lane)
        return lane

    def accept(self, row: CommandRow, payload: bytes, request: Request) -> None:
        """Sent again, it is acknowledged again, and that is all. Another one under its seq is a conflict."""
        shaped = None
        if not self._waiters.is_open(row.future):
            self._open.add(row)
            of_run = row.folder is not None and row.kind not in SAMPLING_KINDS
            if of_run and row.seq >= self._planner.next_seq(row.lane):
                self._registry.saving(row)
                if shaped := self._registry.shaped_by(row, self._planner.next_seq(row.lane)):
                    self._registry.add_run(shaped)
            self._registry.begun(row.lane)
        self._journal(row, payload, payload, None, request, lambda: self._plan_or_fail(row, payload), shaped)

    def refuse(self, row: CommandRow, payload: bytes | None, error: ErrorInfo, request: Request) -> None:
        """It fails with `error` and costs nothing. Without a `payload`, what it said was not understood."""
        shown = told(row, error)
        content = encode(error) if payload is None else payload
        self._journal(row, b"", content, shown, request, lambda: self._pass_over(row, shown))

    def _journal(
        self,
        row: CommandRow,
        payload: bytes,
        content: bytes,
        refusal: ErrorInfo | None,
        request: Request,
        go_on: Callable[[], None],
        shaped: RunRow | None = None,
    ) -> None:
        is_new = not self._waiters.is_open(row.future)
        if is_new:
            self._waiters.opened(row.future)
            self._waiters.watch(row.future, request.connection)

        def journal(store: Store) -> _Earlier | None:
            digest = _digest(row.kind, row.arguments, content)  # here, since large ones take milliseconds
            if used := store.command_accepted(row, payload, digest, self._now()):
                return _Earlier(used, used.digest in (None, digest), store.result(row.future))
            if shaped is not None:
                store.run_shaped(shaped)
            if refusal is not None:
                result = ResultRow(row.future, encode(refusal), None)
                store.command_finished(result, "failed", None, [], self._now())
            return None

        def done(earlier: _Earlier | None) -> None:
            if earlier is None:
                request.answer(None)
                go_on()
            else:
                self._resent(row, earlier, is_new, request)

        self._writer.write(journal, done, len(content))

    def _resent(self, row: CommandRow, earlier: _Earlier, is_new: bool, request: Request) -> None:
        """This (run, seq) was used before: for the same request, or for another one."""
        used, result = earlier.used, earlier.result
        if not earlier.is_same:
            problem = f"request {row.seq} of {row.lane} is a {used.kind} ({_WORD[used.state]}), "
            same = "with another content" if used.kind == row.kind else f"and a {row.kind} came under the same number"
            request.answer(SeqConflictError(problem + same, field="seq"))
        else:
            request.answer(None)
            if used.state == "queued":
                self._waiters.watch(row.future, request.connection)
            elif not is_new:
                self._finishing.tell([request.connection], row.future, *_outcome(row, result))
        if is_new:
            if row.future in self._open.rows:
                self._open.forget(row.future)
            self._registry.saved(row)
            told = self._waiters.resolved(row.future)
            others = told if earlier.is_same else told - {request.connection}
            self._finishing.tell(others, row.future, *_outcome(row, result))

    def _plan_or_fail(self, row: CommandRow, payload: bytes) -> None:
        if row.lane in self._open.broken:
            self._finishing.fail(row.future, ActorLostError(self._open.broken[row.lane]))
        elif (error := self._open.ending.get(row.future)) is not None:
            self._planner.skip(row.lane, row.seq)
            self._finishing.fail(row.future, error)
            self._work_arrived()
        else:
            self._open.payloads.hold(row.future, payload)
            self._plan(row)

    def _plan(self, row: CommandRow) -> None:
        sampler = self._registry.sampler_of(row.lane)
        self._stages.accepted(row)
        self._planner.submit(planned(row, priority=sampler.priority if sampler else 0))
        self._recovering.wake(row.lane)
        self._work_arrived()

    def _pass_over(self, row: CommandRow, error: ErrorInfo) -> None:
        self._stages.refused(row)
        self._planner.skip(row.lane, row.seq)
        self._finishing.tell(self._waiters.resolved(row.future), row.future, encode(error), None)
        self._work_arrived()


def kept_costs(store: Store, now: float) -> dict[Holder, int]:
    """What storage has cost in this month by now, in millionths of a micro-dollar."""
    costs = Counter[Holder]()
    for line in store.kept(("tenant", "project", "key"), now, start=month_began(now)):
        tenant, project, key = line.of
        holders = holders_of(TenantId(tenant), KeyId(key) or None, ProjectId(project))
        costs.update(dict.fromkeys(holders, line.cost))
    return costs


def _outcome(row: CommandRow, result: ResultRow | None) -> tuple[bytes | None, bytes | None]:
    if result is None:
        return encode(NotFoundError(f"the result of {row.future!r} is kept no longer", field="future").info), None
    return result.error, result.payload


def _digest(kind: CommandKind, arguments: CommandArguments, content: bytes) -> bytes:
    """Of what was understood, which is encoded in one way only: a resend may have travelled in another form.

    Which place a save's sampler gets is no part of it: the Tinker SDK takes the next one each time that it sends.
    """
    if arguments.sampler_slot is not None:
        arguments = msgspec.structs.replace(arguments, sampler_slot=0)
    digest = hashlib.sha256(encode((kind, arguments)))
    digest.update(content)
    return digest.digest()
