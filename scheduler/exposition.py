"""What Prometheus is told of the broker: what was counted as it happened, and how things are at this moment.

Nothing here walks commands that wait: it costs the same however many there are.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..storage.writer import Writer
from .observing.counts import Counts
from .observing.unsaved import Unsaved
from .open_commands import OpenCommands, Sort
from .overview import Overlook
from .planning.planner import Planner
from .registry import Registry

_Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily
_Values: TypeAlias = Mapping[tuple[str, ...], float]


class Exposition(Collector):
    """`connected` is how many clients are, a gateway's among them once for each key."""

    def __init__(
        self,
        counts: Counts,
        open_: OpenCommands,
        registry: Registry,
        planner: Planner,
        writer: Writer,
        overview: Overlook,
        unsaved: Unsaved,
        now: Callable[[], float],
    ) -> None:
        self._open, self._models, self._planner, self._writer = open_, registry.models, planner, writer
        self._overview, self._unsaved, self._now = overview, unsaved, now
        self.connected: Callable[[], int] = lambda: 0
        self._registry = counts.registry
        self._registry.register(self)

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def describe(self) -> Iterable[_Family]:
        """Their names are all different: nobody need collect to find that out."""
        return ()

    def collect(self) -> Iterator[_Family]:
        yield from self._queues()
        yield from self._actors()
        yield from self._saving()
        yield from self._service()

    def _queues(self) -> Iterator[_Family]:
        commands, tokens = Counter[Sort](), Counter[Sort]()
        for (_, model, kind), count in self._open.counts.items():
            commands[model, kind] += count
        for (_, model, kind), count in self._open.tokens.items():
            tokens[model, kind] += count
        now = self._now()
        oldest = {sort: now - next(iter(times.values())) for sort, times in self._open.accepted_at.items() if times}
        labels = ("model", "kind")
        yield _gauges("lorry_open_commands", "Commands that were accepted and are not over.", labels, commands)
        yield _gauges("lorry_open_tokens", "Tokens of commands that are not over, as clients said.", labels, tokens)
        yield _gauges(
            "lorry_oldest_command_seconds",
            "For how long the oldest command that is not over has been accepted.",
            labels,
            {sort: max(0.0, age) for sort, age in oldest.items()},
        )

    def _actors(self) -> Iterator[_Family]:
        loads, labels = self._overview.loads(), ("model", "actor")
        of = {load.actor: (load.base_model, str(load.actor)) for load, _ in loads}
        states = Counter((load.base_model, "leaving" if load.is_leaving else "ready") for load, _ in loads)
        yield _gauges("lorry_actors", "Actors that are there, by state.", ("model", "state"), states)
        told: dict[tuple[str, str], dict[tuple[str, ...], float]] = {
            ("lorry_actor_runs", "Runs whose state is with the actor."): {of[a.actor]: a.runs for a, _ in loads},
            ("lorry_actor_slots", "Places for adapters on the actor's device."): {
                of[a.actor]: row.slots for a, (row, _) in loads
            },
            ("lorry_actor_slots_used", "Slots that hold an adapter."): {
                of[a.actor]: ping.slots_used for a, (_, ping) in loads
            },
            ("lorry_actor_cache_blocks", "Blocks of the actor's KV cache."): {
                of[a.actor]: ping.cache_blocks for a, (_, ping) in loads
            },
            ("lorry_actor_cache_blocks_held", "KV-cache blocks that sequences hold."): {
                of[a.actor]: ping.cache_blocks_held for a, (_, ping) in loads
            },
            ("lorry_actor_cache_blocks_kept", "KV-cache blocks that are kept, since their prefix is known."): {
                of[a.actor]: ping.cache_blocks_kept for a, (_, ping) in loads
            },
        }
        for (name, help_), values in told.items():
            yield _gauges(name, help_, labels, values)
        swaps = {of[load.actor]: load.swaps for load, _ in loads}
        yield _counters("lorry_actor_swaps", "Adapters that were moved on or off the device.", labels, swaps)
        seconds = {(*of[load.actor], "train"): load.train_s for load, _ in loads}
        seconds |= {(*of[load.actor], "sample"): load.sample_s for load, _ in loads}
        yield _counters("lorry_actor_compute_seconds", "Time that the actor has computed.", (*labels, "mode"), seconds)

    def _saving(self) -> Iterator[_Family]:
        now, newest, oldest = self._now(), self._unsaved.newest_save_at, self._unsaved.oldest_at()
        yield _gauge("lorry_unsaved_runs", "Runs that have changed since they were saved.", len(self._unsaved))
        yield _gauge(
            "lorry_oldest_unsaved_seconds",
            "For how long the run that waits longest to be saved has waited; 0 where none does.",
            0.0 if oldest is None else max(0.0, now - oldest),
        )
        yield _gauges(
            "lorry_newest_save_seconds",
            "How long ago a run's state was saved last; nothing before the first time.",
            (),
            {} if newest is None else {(): max(0.0, now - newest)},
        )

    def _service(self) -> Iterator[_Family]:
        usable = self._models.all()
        ready = sum(facts is not None and bool(self._planner.actors_of(name)) for name, facts in usable.items())
        states = {("ready",): ready, ("loading",): len(usable) - ready, ("failed",): self._models.failures}
        yield _gauges("lorry_models", "Base models, by state; one without an actor is loading.", ("state",), states)
        yield _counters(
            "lorry_spread_commands", "Commands that several actors executed.", (), {(): self._planner.spreads}
        )
        yield _gauge(
            "lorry_client_connections", "Connections of clients, a gateway's keys among them.", self.connected()
        )
        yield _gauge(
            "lorry_journal_writable", "1 while the journal can be written, 0 while not.", self._writer.trouble is None
        )
        yield _gauge(
            "lorry_broker_start_time_seconds", "When the broker started, in Unix seconds.", self._overview.counted_since
        )


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_, value=value)


def _gauges(name: str, help_: str, labels: Iterable[str], values: _Values) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_, labels=tuple(labels))
    for of, value in values.items():
        family.add_metric(of, value)
    return family


def _counters(name: str, help_: str, labels: Iterable[str], values: _Values) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=tuple(labels))
    for of, value in values.items():
        family.add_metric(of, value)
    return family
