"""Which runs a list shows, and what it says of each. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ...wire.types import ClientSession, TrainingRun

State: TypeAlias = Literal["waiting", "active", "idle", "finished", "errored", "interrupted"]
STATES: tuple[State, ...] = get_args(State)
_ACTIVE_S = 120.0
_ENDED: Mapping[str, State] = {"success": "finished", "errored": "errored", "interrupted": "interrupted"}


@dataclass(frozen=True, slots=True)
class Listed:
    """`waiting` of its commands are not over."""

    run: TrainingRun
    session: ClientSession | None
    waiting: int
    state: State

    @property
    def id(self) -> str:
        return self.run.training_run_id

    @property
    def name(self) -> str:
        """What its owner calls it, where that was said."""
        named = (self.run.user_metadata or {}).get("name") or (self.session and self.session.display_name)
        return named or self.id

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.run.user_metadata or {}

    @property
    def words(self) -> str:
        said = (f"{key}={value}" for key, value in self.metadata.items())
        return "\n".join((self.id, self.name, self.run.base_model, self.run.project, *said)).casefold()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Every word of `text` is somewhere in a run's id, name, model, project or metadata, where KEY=VALUE is one."""

    text: str = ""
    project: str = ""
    state: str = ""

    def takes(self, listed: Listed) -> bool:
        words = listed.words
        return (
            all(word in words for word in self.text.casefold().split())
            and self.project in ("", listed.run.project)
            and self.state in ("", listed.state)
        )


def listed(
    runs: Iterable[TrainingRun], sessions: Iterable[ClientSession], waiting: Mapping[str, int], now: float
) -> list[Listed]:
    """The one that was used last comes first."""
    by_run = {run: session for session in sessions for run in session.training_run_ids}
    newest = sorted(runs, key=lambda run: run.last_request_time, reverse=True)
    return [_listed(run, by_run.get(run.training_run_id), waiting, now) for run in newest]


def _listed(run: TrainingRun, session: ClientSession | None, waiting: Mapping[str, int], now: float) -> Listed:
    count = waiting.get(run.training_run_id, 0)
    state: State = "active" if now - run.last_request_time < _ACTIVE_S else "idle"
    if count:
        state = "waiting"
    elif session is not None and session.status is not None:
        state = _ENDED.get(session.status, state)
    return Listed(run, session, count, state)


@dataclass(frozen=True, slots=True)
class Slice:
    """One page of a list: the rows from the `first`, counted from 1, of `total`."""

    rows: Sequence[Listed]
    number: int
    pages: int
    first: int
    total: int


def slice_of(rows: Sequence[Listed], number: int, most: int) -> Slice:
    pages = max(1, -(-len(rows) // most))
    number = min(max(number, 1), pages)
    start = (number - 1) * most
    return Slice(rows[start : start + most], number, pages, start + 1 if rows else 0, len(rows))
