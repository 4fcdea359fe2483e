"""Why a command has not resolved yet: what it waits for, what is before it, and for about how long."""

from collections.abc import Callable

from ..storage.rows import CommandRow
from ..storage.writer import Writer
from ..wire.catalogue_messages import FutureState
from ..wire.commands import SAMPLING_KINDS
from ..wire.errors import LorryError, NotFoundError
from ..wire.ids import FutureId
from .open_commands import OpenCommands
from .planning.foresight import Ahead, Foresight
from .planning.planner import Planner
from .planning.rates import Rates
from .registry import Registry


class Queueing:
    def __init__(
        self,
        open_: OpenCommands,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        now: Callable[[], float],
    ) -> None:
        self._open, self._registry, self._planner, self._writer, self._now = open_, registry, planner, writer, now
        self.rates, self._foresight = Rates(), Foresight(planner)

    def ended(self, row: CommandRow, cost: int) -> None:
        """A command that an actor executed, of so many tokens as were planned."""
        mode = "sample" if row.kind in SAMPLING_KINDS else "train"
        is_busy = self._planner.is_busy(row.base_model, row.kind)
        self.rates.ended(row.base_model, mode, cost, self._now(), is_busy=is_busy)

    def state(self, future: FutureId) -> FutureState:
        """Why it has not resolved yet. Raises NotFoundError where it has, or never was."""
        if (row := self._open.rows.get(future)) is None:
            raise NotFoundError(f"{future!r} does not wait for anything", field="future")
        if self._writer.trouble is not None:
            return FutureState("paused_capacity", self._writer.trouble)
        if not self._planner.actors_of(row.base_model):
            try:
                return self.model_state(row.base_model)
            except LorryError as error:  # should an actor load it later, the command will be executed
                return FutureState("paused_capacity", str(error))
        if self._planner.holder(future) or self._planner.is_spread(future):
            return FutureState("active", "it is being executed")
        if self._registry.run_of(row.lane) is not None:
            awaited = self._planner.next_seq(row.lane)
            if FutureId(f"{row.lane}:{awaited}") not in self._open.rows:
                return FutureState("active", f"{row.lane} goes on with request {awaited}, which has not arrived")
        elif (limit := self._planner.held_back_by(future, row.base_model)) is not None:
            return FutureState("paused_rate_limit", limit)
        return self._in_turn(row)

    def model_state(self, base_model: str) -> FutureState:
        """Whether something of this model can be computed now. Raises the error of a model that cannot be loaded."""
        if self._registry.models.known(base_model) is None:
            return FutureState("paused_capacity", f"{base_model} is being loaded")
        if not self._planner.actors_of(base_model):
            return FutureState("paused_capacity", f"no actor serves {base_model} at the moment")
        return FutureState("active", f"{base_model} is ready")

    def _in_turn(self, row: CommandRow) -> FutureState:
        ahead = self._foresight.ahead(row.tenant, row.base_model, row.lane, row.future, row.seq, self._now())
        if ahead is None:  # it is on its way into the journal
            return FutureState("active", "it waits for its turn")
        what = "sampling" if row.kind in SAMPLING_KINDS else "training"
        mode = "sample" if row.kind in SAMPLING_KINDS else "train"
        rate = self.rates.rate(row.base_model, mode, self._now())
        if rate is None:
            basis, wait_s = f"no pace of {what} on {row.base_model} is known yet", None
        else:
            wait_s = ahead.tokens / rate.tokens_per_s
            basis = (
                f"{what} on {row.base_model} went at {rate.tokens_per_s:,.0f} tokens/s for the last {rate.over_s:.0f} s"
            )
        return FutureState("active", _told(ahead, wait_s, basis), ahead.requests, ahead.tokens, wait_s, basis)


def _told(ahead: Ahead, wait_s: float | None, basis: str) -> str:
    yours = "request of yours is" if ahead.requests == 1 else "requests of yours are"
    before = f"it waits for its turn: {ahead.requests:,} {yours} before it, {ahead.tokens:,} tokens in all"
    return f"{before}; {basis}" if wait_s is None else f"{before}; about {wait_s:,.0f} s, since {basis}"
