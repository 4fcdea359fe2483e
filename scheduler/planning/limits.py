"""How much of what each tenant, project and key may have, and how much each has. Pure: the time is passed in.

A tenant's limits are its own where it has some, and everyone's otherwise; a project's and a key's are their own and
count beside those.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import NewType

import msgspec

from ...wire.errors import LimitReachedError, TooManyWaitingError
from ...wire.ids import KeyId, LaneId, ProjectId, TenantId
from ...wire.limits import Limits

Holder = NewType("Holder", str)
"""`tenant:NAME`, `project:TENANT/NAME` or `key:ID`, or everyone."""
EVERYONE = Holder("everyone")
ACTIVE_S = 3600.0
"""A run is active for so long after its last request."""
_BURST_S = 2.0
"""Of requests at their rate, that may come at once after a pause; one may always."""
_AGAIN_WITHIN_S = 60.0
_NEAR = 0.8
_PER_USD = 10**12
_NONE = Limits()


def tenant_holder(tenant: TenantId) -> Holder:
    return Holder(f"tenant:{tenant}")


def key_holder(key: KeyId) -> Holder:
    return Holder(f"key:{key}")


def project_holder(tenant: TenantId, project: ProjectId) -> Holder:
    return Holder(f"project:{tenant}/{project}")


@lru_cache(maxsize=4096)
def holders_of(tenant: TenantId, key: KeyId | None, project: ProjectId | None = None) -> tuple[Holder, ...]:
    """The tenant is the first."""
    others = [] if project is None else [project_holder(tenant, project)]
    others += [] if key is None else [key_holder(key)]
    return tenant_holder(tenant), *others


@dataclass(slots=True)
class _Meter:
    """What one holder has. `spent`, on tokens, and `kept`, storage, are in millionths of a micro-dollar, of
    `month`. Requests are counted as a level that
    drains at their rate; `drained_at`, and the last moment that was `promised` to one that is to come again, are in
    Unix seconds."""

    open_tokens: dict[LaneId, int] = field(default_factory=dict[LaneId, int])
    level: float = 0.0
    drained_at: float = 0.0
    promised: float = 0.0
    month: str = ""
    spent: int = 0
    kept: int = 0
    active: dict[LaneId, float] = field(default_factory=dict[LaneId, float])
    told_near: set[str] = field(default_factory=set[str])

    @property
    def usd(self) -> float:
        return (self.spent + self.kept) / _PER_USD


class Meters:
    def __init__(self) -> None:
        self._limits: dict[Holder, Limits] = {}
        self._effective: dict[Holder, Limits] = {}
        self._meters = defaultdict[Holder, _Meter](_Meter)
        self._near: list[tuple[Holder, str]] = []

    def set(self, holder: Holder, limits: Limits) -> None:
        """From now on: what is had already stays."""
        self._limits[holder] = limits
        self._effective.clear()
        self._meters[holder].told_near.clear()
        for meter in self._meters.values():
            meter.promised = 0.0

    def limits(self, holder: Holder) -> Limits:
        if (known := self._effective.get(holder)) is None:
            known = self._effective[holder] = self._found(holder)
        return known

    def _found(self, holder: Holder) -> Limits:
        own = self._limits.get(holder, _NONE)
        if not holder.startswith("tenant:") or (default := self._limits.get(EVERYONE)) is None:
            return own
        said = {name: value for name in Limits.__struct_fields__ if (value := getattr(own, name)) is not None}
        return msgspec.structs.replace(default, **said)

    # What happened ---------------------------------------------------------------------------------------------------

    def opened(self, holders: Iterable[Holder], lane: LaneId, tokens: int) -> None:
        """A command waits or runs."""
        for holder in holders:
            lanes = self._meters[holder].open_tokens
            lanes[lane] = lanes.get(lane, 0) + tokens

    def closed(self, holders: Iterable[Holder], lane: LaneId, tokens: int) -> None:
        for holder in holders:
            lanes = self._meters[holder].open_tokens
            lanes[lane] -= tokens
            if not lanes[lane]:
                del lanes[lane]

    def spent(self, holders: Iterable[Holder], cost: int, now: float) -> None:
        """In millionths of a micro-dollar."""
        for holder in holders:
            self._this_month(holder, now).spent += cost
            self._note_spend(holder, now)

    def kept(self, costs: Mapping[Holder, int], now: float) -> None:
        """What storage has cost in this month by now, in millionths of a micro-dollar."""
        for holder, cost in costs.items():
            meter = self._this_month(holder, now)
            if meter.month == month_of(now):
                meter.kept = cost
                self._note_spend(holder, now)

    def _note_spend(self, holder: Holder, now: float) -> None:
        if (most := self.limits(holder).monthly_usd) is not None:
            self._note(holder, "monthly_usd", self._this_month(holder, now).usd, most)

    def used(self, holders: Iterable[Holder], run: LaneId, now: float) -> None:
        """A request of this run, or that it was made."""
        for holder in holders:
            self._meters[holder].active[run] = now

    def moved(self, run: LaneId, before: Holder, after: Holder) -> None:
        """From one project to another."""
        if (used_at := self._meters[before].active.pop(run, None)) is not None:
            self._meters[after].active[run] = used_at

    def near(self) -> list[tuple[Holder, str]]:
        """Who has come to 80 % of which limit since this was asked, each once until it is below that."""
        found, self._near = self._near, []
        return found

    def open_tokens(self, holder: Holder) -> Mapping[LaneId, int]:
        """Of what waits or runs, by run and sampler."""
        return self._meters[holder].open_tokens

    # What may be -----------------------------------------------------------------------------------------------------

    def check_pace(self, holders: Iterable[Holder], now: float) -> None:
        """One more request. Raises TooManyWaitingError, with the seconds after which it may come again."""
        paced = [(holder, rate) for holder in holders if (rate := self.limits(holder).requests_per_s) is not None]
        for holder, rate in paced:
            meter, most = self._meters[holder], max(1.0, rate * _BURST_S)
            meter.level = min(most, max(0.0, meter.level - (now - meter.drained_at) * rate))
            meter.drained_at = now
            if meter.level + 1 > most + 1e-9:
                # Each that is to come again is told another moment, or all would come at the same; and none is told one
                # so far away that it would sleep through a limit that is lifted.
                first = now + (meter.level + 1 - most) / rate
                meter.promised = min(max(first, meter.promised + 1 / rate), now + _AGAIN_WITHIN_S)
                problem = f"requests_per_s is above {rate:g}, the limit of {holder}"
                raise TooManyWaitingError(problem, field="requests_per_s", after_s=meter.promised - now)
        for holder, _ in paced:
            self._meters[holder].level += 1

    def check_queue(self, holders: Iterable[Holder], tokens: int, goes_on: Callable[[LaneId], bool]) -> None:
        """A command of so many tokens. What waits where nothing `goes_on` is not counted: it may wait for ever. Raises
        TooManyWaitingError where others have to end first."""
        for holder in holders:
            if (most := self.limits(holder).queued_tokens) is None:
                continue
            waiting = sum(n for lane, n in self._meters[holder].open_tokens.items() if goes_on(lane))
            if waiting and waiting + tokens > most:
                problem = f"queued_tokens is {waiting:,} and would be {waiting + tokens:,}, the limit of {holder} is"
                raise TooManyWaitingError(f"{problem} {most:,}", field="queued_tokens")

    def check_size(self, holders: Iterable[Holder], tokens: int, rows: int) -> None:
        """Of one command. Raises LimitReachedError for one that would exceed a limit alone."""
        for holder in holders:
            limits = self.limits(holder)
            if limits.queued_tokens is not None and tokens > limits.queued_tokens:
                most = f"{limits.queued_tokens:,}"
                raise _over(holder, "queued_tokens", f"{tokens:,} of one request", most, "Send less in one")
            if limits.concurrent_samples is not None and rows > limits.concurrent_samples:
                most = str(limits.concurrent_samples)
                raise _over(holder, "concurrent_samples", f"{rows} of one request", most, "Ask for fewer in one")

    def check_spend(self, holders: Iterable[Holder], now: float) -> None:
        """Raises LimitReachedError once the month's money is spent."""
        for holder in holders:
            most, spent = self.limits(holder).monthly_usd, self._this_month(holder, now).usd
            if most is not None and spent >= most:
                ends = f"It ends with the month, in UTC; {_next_month(now)} is the first day of the next"
                raise _over(holder, "monthly_usd", f"{spent:,.6f}", f"{most:,.6f}", ends)

    def check_run(self, holders: Iterable[Holder], rank: int, base_model: str, now: float) -> None:
        """A run that is to be made. Raises LimitReachedError."""
        for holder in (holders := tuple(holders)):
            if (most := self.limits(holder).runs) is not None:
                self._check_active(holder, most, now)
        self.check_shape(holders, rank, base_model)

    def check_shape(self, holders: Iterable[Holder], rank: int, base_model: str) -> None:
        """Of a run. Raises LimitReachedError."""
        for holder in (holders := tuple(holders)):
            most = self.limits(holder).rank
            if most is not None and rank > most:
                raise _over(holder, "rank", str(rank), str(most), "Make an adapter of a smaller rank")
        self.check_model(holders, base_model)

    def check_model(self, holders: Iterable[Holder], base_model: str) -> None:
        """Raises LimitReachedError."""
        for holder in holders:
            allowed = self.limits(holder).models
            if allowed is not None and base_model not in allowed:
                others = ", ".join(allowed) or "none"
                raise _over(holder, "models", repr(base_model), others, "Choose one of these")

    def check_stored(self, holders: Iterable[Holder], stored: Mapping[Holder, int]) -> None:
        """One more checkpoint, beside those that take so many bytes. Raises LimitReachedError."""
        for holder in holders:
            most, has = self.limits(holder).stored_bytes, stored.get(holder, 0)
            if most is None:
                continue
            if has >= most:
                raise _over(holder, "stored_bytes", f"{has:,}", f"{most:,}", "Delete checkpoints, or have them expire")
            self._note(holder, "stored_bytes", has, most)

    def kept_for_s(self, holders: Iterable[Holder], kind: str) -> int | None:
        """A checkpoint of this kind that is saved without a time to live; None for ever."""
        said = (getattr(self.limits(holder), f"{kind}_ttl_s") for holder in holders)
        return min((seconds for seconds in said if seconds is not None), default=None)

    def keeps_last(self, holders: Iterable[Holder]) -> int | None:
        """How many checkpoints with names, of each kind, a run keeps; None for all."""
        said = (self.limits(holder).keep_last for holder in holders)
        return min((count for count in said if count is not None), default=None)

    def limits_anything(self) -> bool:
        return bool(self._limits)

    def limits_rows(self) -> bool:
        return any(limits.concurrent_samples is not None for limits in self._limits.values())

    def rows_at_most(self, holder: Holder) -> int | None:
        return self.limits(holder).concurrent_samples

    def limits_storage(self, holders: Iterable[Holder]) -> bool:
        return any(self.limits(holder).stored_bytes is not None for holder in holders)

    def _check_active(self, holder: Holder, most: int, now: float) -> None:
        meter = self._meters[holder]
        meter.active = {run: at for run, at in meter.active.items() if at > now - ACTIVE_S}
        if (has := len(meter.active)) >= most:
            first = min(meter.active.values(), default=now) + ACTIVE_S
            wait = f"A run counts for {ACTIVE_S / 60:.0f} minutes after its last request: the next place is free at "
            raise _over(holder, "runs", str(has), str(most), wait + _moment(first))
        self._note(holder, "runs", has + 1, most)

    def _this_month(self, holder: Holder, now: float) -> _Meter:
        meter, month = self._meters[holder], month_of(now)
        if meter.month < month:  # never back, should the clock be
            meter.month, meter.spent, meter.kept = month, 0, 0
        return meter

    def _note(self, holder: Holder, name: str, has: float, most: float) -> None:
        told = self._meters[holder].told_near
        if has < _NEAR * most:
            told.discard(name)
        elif name not in told:
            told.add(name)
            self._near.append((holder, f"{name} is {has:,g} of {most:,g}"))


def month_of(now: float) -> str:
    """In UTC, as YYYY-MM."""
    return _month_of_day(int(now // 86_400))


@lru_cache(maxsize=8)
def _month_of_day(day: int) -> str:
    """Counted from the first of 1970: every command asks, several times."""
    return datetime.fromtimestamp(day * 86_400, UTC).strftime("%Y-%m")


def month_began(now: float) -> float:
    return datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0).timestamp()


def _next_month(now: float) -> str:
    day = datetime.fromtimestamp(now, UTC)
    return f"{day.year + day.month // 12}-{day.month % 12 + 1:02d}-01"


def _moment(at: float) -> str:
    return datetime.fromtimestamp(math.ceil(at), UTC).isoformat(timespec="seconds")


def _over(holder: Holder, name: str, has: str, most: str, way_out: str) -> LimitReachedError:
    return LimitReachedError(f"{name} is {has}, the limit of {holder} is {most}. {way_out}", field=name)
