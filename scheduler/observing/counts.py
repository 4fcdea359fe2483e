"""What is counted for Prometheus as it happens: commands, micro-batches, tokens, commits, actors. No I/O.

What can be told by looking, as how much waits, is read when somebody asks: `scheduler.exposition`.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from ...wire.commands import CommandKind
from ...wire.types import UsageKind

disable_created_metrics()  # when each was made would double what is scraped, and says nothing of a service

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = tuple(4**power for power in range(1, 11))

Stage: TypeAlias = Literal["queue", "execution", "total"]
Ended: TypeAlias = Literal["queued", "done", "failed", "discarded"]
"""A command's state in the journal; queued is none of them."""


class Counts:
    """A registry of its own: whoever runs two brokers in a process has two. Labels are kinds, states, and the names of
    models that the operator gave: nothing that a client says."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._stages = {
            "queue": Histogram(
                "lorry_command_queue_seconds",
                "From a command's acceptance until it was handed out to an actor for the first time.",
                ["kind"],
                buckets=_SECONDS,
                registry=registry,
            ),
            "execution": Histogram(
                "lorry_command_execution_seconds",
                "From when a command was handed out for the first time until it was over.",
                ["kind"],
                buckets=_SECONDS,
                registry=registry,
            ),
            "total": Histogram(
                "lorry_command_seconds",
                "From a command's acceptance until it was over.",
                ["kind"],
                buckets=_SECONDS,
                registry=registry,
            ),
        }
        self._finished = Counter(
            "lorry_commands_finished", "Commands that are over, by how.", ["model", "kind", "state"], registry=registry
        )
        self._tokens = Counter(
            "lorry_tokens",
            "Tokens that were used, as they are billed; cached_prefill are those of prompts that were found computed.",
            ["model", "kind"],
            registry=registry,
        )
        batches = [
            Histogram(f"lorry_micro_batch_{what}", help_, ["mode"], buckets=buckets, registry=registry)
            for what, help_, buckets in (
                ("commands", "Commands that were handed out together.", _COUNTS),
                ("tokens", "Tokens of what was handed out together, as far as was known before.", _TOKENS),
                ("runs", "Runs and samplers whose commands were handed out together.", _COUNTS),
            )
        ]
        self._batches = {mode: [each.labels(mode) for each in batches] for mode in ("train", "sample")}
        self._replayed = Counter(
            "lorry_replayed_commands", "Commands executed again to rebuild runs.", ["model"], registry=registry
        )
        self._restored = Counter(
            "lorry_restored_runs", "Runs that were rebuilt from a saved state.", ["model"], registry=registry
        )
        self._handed_out_again = Counter(
            "lorry_commands_handed_out_again",
            "Commands handed out again, since an actor died or a run had to be rebuilt.",
            ["model"],
            registry=registry,
        )
        self._actors_started = Counter(
            "lorry_actor_starts", "Actors that joined the broker.", ["model"], registry=registry
        )
        self._actors_ended = Counter(
            "lorry_actor_ends",
            "Actors that are gone: lost, or stopped in good order.",
            ["model", "state"],
            registry=registry,
        )
        self._commit_seconds = Histogram(
            "lorry_journal_commit_seconds",
            "Time of a commit of the journal.",
            buckets=_COMMIT_SECONDS,
            registry=registry,
        )
        self._commit_operations = Histogram(
            "lorry_journal_commit_operations",
            "Changes that one commit made durable.",
            buckets=_COUNTS,
            registry=registry,
        )
        # `labels` looks its names up under a lock: what happens for each command is looked up once.
        self._stage_of: dict[tuple[Stage, CommandKind], Histogram] = {}
        self._finished_of: dict[tuple[str, CommandKind, Ended], Counter] = {}
        self._tokens_of: dict[tuple[str, UsageKind], Counter] = {}

    def took(self, stage: Stage, kind: CommandKind, seconds: float) -> None:
        """Not below 0, whatever was done to the clock."""
        if (histogram := self._stage_of.get((stage, kind))) is None:
            histogram = self._stage_of[stage, kind] = self._stages[stage].labels(kind)
        histogram.observe(max(0.0, seconds))

    def finished(self, model: str, kind: CommandKind, state: Ended) -> None:
        if (counter := self._finished_of.get((model, kind, state))) is None:
            counter = self._finished_of[model, kind, state] = self._finished.labels(model, kind, state)
        counter.inc()

    def used(self, model: str, tokens: Mapping[UsageKind, int]) -> None:
        for kind, count in tokens.items():
            if (counter := self._tokens_of.get((model, kind))) is None:
                counter = self._tokens_of[model, kind] = self._tokens.labels(model, kind)
            counter.inc(count)

    def micro_batch(self, mode: Literal["train", "sample"], commands: int, tokens: int, runs: int) -> None:
        for histogram, count in zip(self._batches[mode], (commands, tokens, runs), strict=True):
            histogram.observe(count)

    def handed_out_again(self, model: str) -> None:
        self._handed_out_again.labels(model).inc()

    def restored(self, model: str, replayed: int) -> None:
        self._restored.labels(model).inc()
        self._replayed.labels(model).inc(replayed)

    def actor_joined(self, model: str) -> None:
        self._actors_started.labels(model).inc()

    def actor_ended(self, model: str, state: Literal["lost", "stopped"]) -> None:
        self._actors_ended.labels(model, state).inc()

    def committed(self, operations: int, seconds: float) -> None:
        self._commit_operations.observe(operations)
        self._commit_seconds.observe(seconds)
