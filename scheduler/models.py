"""The base models that are served: loading, ready, or not to be loaded. Whoever needs one that is loading can wait."""

from collections.abc import Iterable
from dataclasses import dataclass

import anyio

from ..wire.actor_messages import ModelFacts
from ..wire.commands import check_lora_config
from ..wire.errors import ErrorInfo, UnknownModelError, revive
from ..wire.types import LoraConfig


@dataclass(frozen=True, slots=True)
class Known:
    """What an actor of a model has told: its facts, and the largest rank that it takes."""

    facts: ModelFacts
    max_rank: int

    def check(self, lora: LoraConfig) -> None:
        """Raises InvalidRequestError where no actor of the model could make such an adapter."""
        check_lora_config(lora, self.max_rank, self.facts.trainable, self.facts.frozen_experts)


class Models:
    def __init__(self, names: Iterable[str]) -> None:
        self._models: dict[str, Known | ErrorInfo | None] = dict.fromkeys(names)
        self._settled = {name: anyio.Event() for name in self._models}

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def seen(self, name: str, facts: ModelFacts, max_rank: int) -> None:
        self._models[name] = Known(facts, max_rank)
        self._settled[name].set()

    def failed(self, name: str, error: ErrorInfo) -> None:
        """No actor can load it. Should another one have, or do so later, that counts for more."""
        if not isinstance(self._models[name], Known):
            self._models[name] = error
            self._settled[name].set()

    def known(self, name: str) -> Known | None:
        """None while it is being loaded. Raises UnknownModelError, and for one that failed what its actor said."""
        if name not in self._models:
            served = ", ".join(self._models) or "none"
            raise UnknownModelError(f"base_model is {name!r}, served are: {served}", field="base_model")
        state = self._models[name]
        if isinstance(state, ErrorInfo):
            raise revive(state)
        return state

    async def ready(self, name: str) -> Known:
        """Waits while it is being loaded. Raises as `known` does."""
        while (known := self.known(name)) is None:
            await self._settled[name].wait()
        return known

    def all(self) -> dict[str, ModelFacts | None]:
        """Those that can be used, or will be: without facts while they are being loaded."""
        usable = {name: state for name, state in self._models.items() if not isinstance(state, ErrorInfo)}
        return {name: known and known.facts for name, known in usable.items()}

    def told_of(self, name: str) -> Known | None:
        """What is known of a model by now, whatever its state."""
        known = self._models.get(name)
        return known if isinstance(known, Known) else None

    @property
    def failures(self) -> int:
        return sum(isinstance(state, ErrorInfo) for state in self._models.values())
