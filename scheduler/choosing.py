"""Which checkpoints a filter means. Pure."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from ..storage.rows import CheckpointRow
from ..wire.catalogue_messages import CheckpointFilter
from ..wire.errors import InvalidRequestError
from ..wire.ids import ProjectId, RunId


def checked(wanted: CheckpointFilter) -> CheckpointFilter:
    """Raises InvalidRequestError for one that says nothing: it would mean everything."""
    said = (wanted.run, wanted.project, wanted.kind, wanted.older_than_s, wanted.user_metadata, wanted.but_newest)
    if not any(said):
        expected = "something of run, project, kind, older_than_s, user_metadata or but_newest"
        raise InvalidRequestError.of("chosen", "everything", expected)
    return wanted


def chosen(
    checkpoints: Iterable[CheckpointRow],
    wanted: CheckpointFilter,
    project_of: Callable[[RunId], ProjectId],
    now: float,
) -> list[CheckpointRow]:
    """The oldest first. The newest of a run and kind are those, whatever else is said of them."""
    by_age = sorted(checkpoints, key=lambda each: (each.created_at, each.seq), reverse=True)
    newer = defaultdict[tuple[str, str], int](int)
    found: list[CheckpointRow] = []
    for each in by_age:
        place = newer[each.run, each.kind]
        newer[each.run, each.kind] += 1
        if (
            (wanted.public or not each.public)
            and wanted.run in (None, each.run)
            and wanted.kind in (None, each.kind)
            and (wanted.project is None or wanted.project == project_of(each.run))
            and (wanted.older_than_s is None or each.created_at < now - wanted.older_than_s)
            and wanted.user_metadata.items() <= each.user_metadata.items()
            and (wanted.but_newest is None or place >= wanted.but_newest)
        ):
            found.append(each)
    return found[::-1]
