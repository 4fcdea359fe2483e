"""What may be accepted, and what its names mean: a command is understood once, when it comes. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..storage.rows import CommandRow, RunRow, SamplerRow
from ..wire.commands import MAX_SEQ, SAMPLING_KINDS
from ..wire.errors import InvalidRequestError, MessageTooLargeError, TooManyWaitingError
from ..wire.ids import LaneId, TenantId
from ..wire.limits import TTL_AT_MOST_S
from .config import BrokerConfig
from .open_commands import holders
from .planning.limits import Holder, Meters, holders_of
from .registry import Registry, sampler_in_slot
from .saves import SAVES, is_ephemeral, saved_folder, saved_path, weights_gone

_LONGEST_S = 30 * 86400.0


def timed(row: CommandRow, timeout_s: float | None, now: float) -> CommandRow:
    """With its deadline; what cannot be one is found by `Admission.admit`."""
    return row if timeout_s is None else replace(row, timeout_s=timeout_s, deadline=now + timeout_s)


def check_ttl(ttl_seconds: int) -> None:
    """Raises InvalidRequestError."""
    if not 1 <= ttl_seconds <= TTL_AT_MOST_S:
        expected = f"a whole number from 1 to {TTL_AT_MOST_S:,}, or None for ever"
        raise InvalidRequestError.of("ttl_seconds", ttl_seconds, expected)


class Admission:
    """`goes_on` says of which runs and samplers something is under way, or will be."""

    def __init__(
        self,
        config: BrokerConfig,
        registry: Registry,
        meters: Meters,
        goes_on: Callable[[LaneId], bool],
        now: Callable[[], float],
    ) -> None:
        self._config, self._registry, self._meters = config, registry, meters
        self._goes_on, self._now = goes_on, now

    def check_place(self, lane: RunRow | SamplerRow, seq: int, next_seq: int | None) -> None:
        """Whether a command can have this place in the order at all: one that cannot leaves no gap behind.

        `next_seq` is the run's, None for a sampler. Raises InvalidRequestError, and TooManyWaitingError for one that
        is to come again.
        """
        if not 0 <= seq < MAX_SEQ:
            raise InvalidRequestError.of("seq", seq, "a whole number from 0 to below 2**63 - 1")
        if isinstance(lane, SamplerRow) or next_seq is None:
            return
        if seq < lane.first_seq:
            raise InvalidRequestError.of("seq", seq, f"at least {lane.first_seq}, the run's first")
        if seq - next_seq > self._config.max_waiting:
            raise TooManyWaitingError(
                f"seq is {seq}, expected at most {self._config.max_waiting} ahead of {next_seq}, which runs next",
                field="seq",
            )

    def check_room(self, row: CommandRow, next_seq: int | None, *, waits_for_it: bool) -> None:
        """For one that is not open. What comes while its run `waits_for_it`, or for what is before it, comes in however
        much is queued: a client may send the parts of a large call before the first of them.

        Raises TooManyWaitingError for one that is to come again.
        """
        if not self._meters.limits_anything() or (next_seq is not None and row.seq < next_seq):
            return  # what is over is answered again
        asking = holders(row)
        if not waits_for_it:
            self._meters.check_queue(asking, row.tokens, self._goes_on)
        self._meters.check_pace(asking, self._now())

    def admit(self, lane: RunRow | SamplerRow, row: CommandRow, payload_bytes: int, next_seq: int | None) -> CommandRow:
        """The command with its names looked up; `next_seq` as `check_place` has it.

        Raises InvalidRequestError, MessageTooLargeError, NotFoundError, LimitReachedError.
        """
        if payload_bytes > self._config.max_payload_bytes:
            raise MessageTooLargeError(f"payload has {payload_bytes:,} bytes, limit {self._config.max_payload_bytes:,}")
        if (row.kind in SAMPLING_KINDS) != isinstance(lane, SamplerRow):
            raise InvalidRequestError.of("kind", row.kind, f"a command of a {type(lane).__name__[:-3].lower()}")
        if row.kind in SAMPLING_KINDS and not 0 <= row.rows <= 1024:
            raise InvalidRequestError.of("rows", row.rows, "a whole number from 0 to 1024")
        if self._meters.limits_anything():
            self._check_limits(lane, row)
        if row.timeout_s is not None and not 0 < row.timeout_s <= _LONGEST_S:
            raise InvalidRequestError.of("timeout_s", row.timeout_s, f"seconds above 0, up to {_LONGEST_S:,.0f}")
        ttl = row.arguments.ttl_seconds
        if ttl is not None:
            check_ttl(ttl)
        if row.arguments.stream and row.kind != "sample":
            raise InvalidRequestError.of("arguments.stream", True, f"False: a sample is streamed, and no {row.kind}")
        if isinstance(lane, SamplerRow):
            if lane.outlived:
                raise weights_gone(lane)
            return replace(row, folder=lane.folder) if lane.in_flight else row
        # It may have been made while nothing was known of its model; and one that failed may be loaded yet.
        if known := self._registry.models.told_of(lane.base_model):
            known.check(lane.lora)
        if row.kind in SAVES:
            self._check_save(lane, row)
            return replace(row, folder=saved_folder(row, self._config.checkpoints))
        if row.kind == "load_state":
            begins = self._registry.begins_with(row, next_seq)
            return replace(row, folder=self._registry.loadable(lane, row.arguments.path, row.seq, begins=begins))
        return row

    def _check_limits(self, lane: RunRow | SamplerRow, row: CommandRow) -> None:
        asking = holders(row)
        self._meters.check_spend(asking, self._now())
        self._meters.check_size(asking, row.tokens, row.rows if row.kind in SAMPLING_KINDS else 0)
        if isinstance(lane, SamplerRow):
            self._meters.check_model(asking, lane.base_model)
        else:
            self._meters.check_shape(asking, lane.lora.rank, lane.base_model)
        if row.kind in SAVES and not is_ephemeral(row) and self._meters.limits_storage(asking):
            self._meters.check_stored(asking, self._stored(row.tenant))

    def _stored(self, tenant: TenantId) -> Mapping[Holder, int]:
        """Bytes of checkpoints with names, of a tenant, its projects, and the keys that their runs were made with."""
        stored = Counter[Holder]()
        for checkpoint in self._registry.checkpoints_of(tenant):
            run = self._registry.run(tenant, checkpoint.run)
            stored.update(dict.fromkeys(holders_of(tenant, run.key, run.project), checkpoint.size_bytes))
        return stored

    def _check_save(self, run: RunRow, row: CommandRow) -> None:
        path, slot = saved_path(row), row.arguments.sampler_slot
        if not row.arguments.overwrite and self._registry.is_taken(path, row.seq):
            wanted = "a name that no checkpoint of this run has, or overwrite=True"
            raise InvalidRequestError.of("name", row.arguments.name, wanted)
        if slot is None:
            return
        if run.session is None:
            raise InvalidRequestError.of("sampler_slot", slot, "a run that was made in a client session")
        made = self._registry.sampler_of(LaneId(sampler_in_slot(run.session, slot)))
        if made is not None and made.model_path != path:
            raise InvalidRequestError.of("sampler_slot", slot, "a place where no other sampler is")
