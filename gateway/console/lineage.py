"""Which run came from which checkpoint, as a tree in the order in which it is told. Pure."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ...wire.lineage import Descent


@dataclass(frozen=True, slots=True)
class Line:
    """A run, `depth` steps below one that came from none of these. `path` is what it began from, None for new weights;
    it may be of a run that is another tenant's."""

    depth: int
    run: str
    path: str | None


def lines(descents: Iterable[Descent]) -> list[Line]:
    """Runs that came from another, and these, each before those that came from it. Of several that one may have come
    from, the first counts; one that would be found in its own line begins another."""
    paths: dict[str, str | None] = {}
    parents: dict[str, str] = {}
    for descent in descents:
        if not descent.parent or descent.run in parents:
            continue
        paths[descent.run] = descent.path
        origin = run_of(descent.path)
        if origin is not None and origin != descent.run and not _leads_to(parents, origin, descent.run):
            paths.setdefault(origin, None)
            parents[descent.run] = origin
    children = defaultdict[str, list[str]](list)
    for run, origin in parents.items():
        children[origin].append(run)
    found: list[Line] = []
    waiting = [(0, run) for run in reversed(paths) if run not in parents and (run in children or paths[run])]
    while waiting:
        depth, run = waiting.pop()
        found.append(Line(depth, run, paths[run]))
        waiting += [(depth + 1, child) for child in reversed(children[run])]
    return found


def run_of(path: str | None) -> str | None:
    if path is None or not path.startswith("tinker://"):
        return None
    return path.removeprefix("tinker://").partition("/")[0]


def _leads_to(parents: dict[str, str], run: str, goal: str) -> bool:
    while run in parents and run != goal:
        run = parents[run]
    return run == goal
