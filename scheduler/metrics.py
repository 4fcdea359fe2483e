"""A run's numbers: which are kept of what actors tell, what a user's loop logs beside, and what of both is read."""

from collections.abc import Callable, Iterable

from ..storage.reader import Reader
from ..storage.rows import CommandRow
from ..storage.store import Store
from ..storage.writer import Writer
from ..wire.actor_messages import Outcome
from ..wire.codec import decode
from ..wire.errors import InvalidRequestError, LimitReachedError, MessageTooLargeError
from ..wire.ids import RunId, TenantId
from ..wire.metrics import (
    BYTES_AT_ONCE,
    LATEST_AT_ONCE,
    NAMES_OF_A_RUN,
    POINTS_AT_ONCE,
    THINNED_AT_LEAST,
    THINNED_VALUES,
    LatestMetrics,
    LogMetrics,
    MetricPlace,
    MetricPoint,
    ReadMetrics,
    RunMetrics,
    RunPoint,
    SourcedPoint,
    check_points,
    is_name,
)
from ..wire.thinning import Thinning
from .observing.newsroom import Newsroom
from .registry import Registry

TOKENS = "tokens:sum"
"""What a step trained on, as it is billed; an actor tells it apart from what a loss names."""


class Metrics:
    """`now` is Unix seconds."""

    def __init__(self, registry: Registry, writer: Writer, newsroom: Newsroom, now: Callable[[], float]) -> None:
        self._registry, self._writer, self._newsroom, self._now = registry, writer, newsroom, now
        self._names: dict[RunId, set[str]] = {}

    def load(self, store: Store) -> None:
        self._names = store.metric_names()

    def names(self, run: RunId) -> list[str]:
        return sorted(self._names.get(run, ()))

    def of_training(self, row: CommandRow, outcome: Outcome) -> Callable[[Store, float], SourcedPoint | None]:
        """Writes down what an actor told of a command that is done. A run has only so many names: what comes with more
        is in the command's result alone."""
        run, told, new = RunId(row.lane), dict(outcome.metrics), list[str]()
        if row.kind == "forward_backward" and outcome.train_tokens:
            told.setdefault(TOKENS, float(outcome.train_tokens))
        names = self._names.setdefault(run, set())
        if not told.keys() <= names:
            new = [name for name in told if name not in names and is_name(name)]
            names.update(new := new[: NAMES_OF_A_RUN - len(names)])
            told = {name: value for name, value in told.items() if name in names}

        def record(store: Store, now: float) -> SourcedPoint | None:
            if new:
                store.metrics_named(run, new)
            return store.step_measured(run, row.kind, told, outcome.data, now)

        return record

    def came(self, tenant: TenantId, run: RunId, points: Iterable[SourcedPoint]) -> None:
        """They are durable."""
        if not self._newsroom.is_followed(tenant):
            return
        for point in points:
            told = RunPoint(run, point.source, point.step, point.at, point.values)
            self._newsroom.measured(tenant, told)

    async def log(self, tenant: TenantId, request: LogMetrics, payload: bytes) -> None:
        """Durable when this returns. Raises NotFoundError, InvalidRequestError, MessageTooLargeError, and
        LimitReachedError where a run would have too many names."""
        run = self._registry.run(tenant, request.run).id
        points = _read(payload)
        new = self._new_names(run, points)
        now = self._now()

        def record(store: Store) -> list[SourcedPoint]:
            store.metrics_named(run, new)
            return store.metrics_logged(run, points, now)

        self.came(tenant, run, await self._writer.write_and_wait(record))

    async def latest(self, tenant: TenantId, request: LatestMetrics, reader: Reader) -> list[RunPoint]:
        """Raises InvalidRequestError for more than is told at once."""
        if len(request.runs) * request.most > LATEST_AT_ONCE:
            expected = f"up to {LATEST_AT_ONCE // len(request.runs):,} of each of {len(request.runs):,} runs"
            raise InvalidRequestError.of("most", request.most, expected)
        own = self._registry.owned(tenant, request.runs)
        return await reader.read(lambda store: store.latest_metrics(own, request.most))

    async def read(self, tenant: TenantId, request: ReadMetrics, reader: Reader) -> RunMetrics:
        """Raises NotFoundError."""
        run = self._registry.run(tenant, request.run).id
        wanted = None if request.names is None else frozenset(request.names)
        if request.at_most_points is None:
            return await reader.read_at_leisure(lambda store: _page(store, run, request.after, request.most, wanted))
        names = self._names.get(run, frozenset[str]())
        count = len(names if wanted is None else names & wanted)
        at_most = min(request.at_most_points, max(THINNED_AT_LEAST, THINNED_VALUES // max(1, count)))
        return await _thinned(reader, run, at_most, wanted)

    def _new_names(self, run: RunId, points: Iterable[MetricPoint]) -> list[str]:
        """Those that the run did not have; it has them from now on."""
        names = self._names.setdefault(run, set())
        new = list(dict.fromkeys(name for point in points for name in point.values if name not in names))
        if len(names) + len(new) > NAMES_OF_A_RUN:
            said = f"points have {len(new)} new names, such as {new[0]!r}, and the run has {len(names)}"
            raise LimitReachedError(f"{said}: it may have {NAMES_OF_A_RUN} in all", field="points")
        names.update(new)
        return new


def _read(payload: bytes) -> list[MetricPoint]:
    if len(payload) > BYTES_AT_ONCE:
        raise MessageTooLargeError(f"points have {len(payload):,} bytes, the limit is {BYTES_AT_ONCE:,}")
    points = decode(payload, list[MetricPoint])
    if len(points) > POINTS_AT_ONCE:
        raise MessageTooLargeError(f"there are {len(points):,} points, the limit is {POINTS_AT_ONCE:,}")
    check_points(points)
    return points


def _of_names(points: Iterable[SourcedPoint], wanted: frozenset[str]) -> list[SourcedPoint]:
    """Those points that have any of the names, without other names."""
    kept = ((point, {name: value for name, value in point.values.items() if name in wanted}) for point in points)
    return [SourcedPoint(point.source, point.step, point.at, values) for point, values in kept if values]


def _page(store: Store, run: RunId, after: MetricPlace | None, most: int, wanted: frozenset[str] | None) -> RunMetrics:
    page = store.run_metrics(run, after, most)
    return page if wanted is None else RunMetrics(_of_names(page.points, wanted), page.next)


async def _thinned(reader: Reader, run: RunId, at_most: int, wanted: frozenset[str] | None) -> RunMetrics:
    """In pages, so that others are read to in between; all in the reader's thread, for it keeps the broker's waiting
    otherwise."""
    steps = await reader.read_at_leisure(lambda store: store.metric_steps(run))
    thinning = Thinning(steps, at_most)

    def add(store: Store, after: MetricPlace | None) -> MetricPlace | None:
        page = _page(store, run, after, POINTS_AT_ONCE, wanted)
        for point in page.points:
            thinning.add(point)
        return page.next

    after = await reader.read_at_leisure(lambda store: add(store, None))
    while after is not None:
        after = await reader.read_at_leisure(lambda store, after=after: add(store, after))
    return RunMetrics(await reader.read_at_leisure(lambda _: thinning.points()))
