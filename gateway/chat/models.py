"""What a request's `model` names: a base model, saved weights, or both; and the sampler of it at the broker.

A path means what it leads to when a request comes. The sampler is named by that, so that all requests that mean the
same share one, whichever gateway they came to.
"""

import hashlib
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ...client.connection import Connection
from ...wire.catalogue_messages import SamplerInfo
from ...wire.client_messages import CreateSampler, SamplerCreated
from ...wire.errors import InvalidRequestError, NotFoundError, UnknownModelError
from ...wire.types import Checkpoint, GetServerCapabilitiesResponse, WeightsInfo
from ..broker import Broker
from .tokenizers import Tokenizers

PATH = "tinker://"
_LISTED_AT_MOST = 1000


@dataclass(frozen=True, slots=True)
class Meant:
    """`folder` is what `path` leads to; both None where the base model is meant. `name` is what the request called
    it."""

    name: str
    base_model: str
    path: str | None = None
    folder: str | None = None

    @property
    def nonce(self) -> str:
        """Of its sampler."""
        text = "\0".join((self.base_model, self.path or "", self.folder or ""))
        return "text-" + hashlib.sha256(text.encode()).hexdigest()[:32]


async def meant_by(broker: Broker, model: str) -> Meant:
    """Raises NotFoundError, InvalidRequestError."""
    base, semicolon, path = model.partition(";")
    if not semicolon:
        base, path = ("", model) if model.startswith(PATH) else (model, "")
    if not path:
        return Meant(model, base)
    found = await broker.look("weights", WeightsInfo, path)
    if base and found.base_model != base:
        raise InvalidRequestError.of("model", model, f"weights of {base}, and not of {found.base_model}")
    return Meant(model, found.base_model, path, found.folder)


def no_model(name: str) -> NotFoundError:
    return NotFoundError(f"there is no model {name!r}, and GET /v1/models lists those that there are", field="model")


@dataclass(slots=True, eq=False)
class Desk:
    """What all requests for text share; nothing that another gateway could not make anew."""

    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    _known: WeakKeyDictionary[Connection, dict[str, SamplerInfo]] = field(
        default_factory=WeakKeyDictionary[Connection, dict[str, SamplerInfo]]
    )

    async def sampler(self, broker: Broker, meant: Meant, within_s: float) -> SamplerInfo:
        """Waits `within_s` seconds for a model that is being loaded. Raises LoadingError, NotFoundError, and what
        has become of the model."""
        known = self._known.setdefault(broker.connection, {})
        if found := known.get(meant.nonce):
            return found
        base = None if meant.path else meant.base_model
        try:
            created = await broker.ask(
                lambda number: CreateSampler(number, meant.nonce, base, meant.path), SamplerCreated
            )
        except UnknownModelError:
            raise no_model(meant.name) from None
        await broker.loaded(created.sampler, within_s)
        found = known[meant.nonce] = await broker.look("sampler", SamplerInfo, created.sampler)
        return found

    def forget(self, broker: Broker, meant: Meant) -> None:
        """The broker has: nobody had asked for it in a long time."""
        self._known.setdefault(broker.connection, {}).pop(meant.nonce, None)


@dataclass(frozen=True, slots=True)
class Listed:
    """`created` is in Unix seconds, 0 where nobody knows."""

    name: str
    created: int
    is_base: bool


async def listed(broker: Broker) -> list[Listed]:
    """Base models, and the newest of the tenant's weights to sample from."""
    models = await broker.look("capabilities", GetServerCapabilitiesResponse)
    checkpoints = await broker.look("checkpoints", list[Checkpoint])
    mine = sorted((c for c in checkpoints if c.checkpoint_type == "sampler"), key=lambda c: c.time, reverse=True)
    bases = [Listed(model.model_name, 0, True) for model in models.supported_models]
    return bases + [Listed(c.tinker_path, int(c.time), False) for c in mine[:_LISTED_AT_MOST]]


async def described(broker: Broker, model: str) -> Listed:
    """Raises NotFoundError, InvalidRequestError."""
    meant = await meant_by(broker, model)
    models = await broker.look("capabilities", GetServerCapabilitiesResponse)
    if meant.base_model not in {each.model_name for each in models.supported_models}:
        raise no_model(model)
    return Listed(model, 0, meant.path is None)
