"""Which actors a deployment has, with what settings each: what is said of one alone, and whose devices are whose."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import msgspec

from lorry.actors.config import ActorSettings
from lorry.arguments import option_name
from lorry.config import ModelConfig, ServeConfig
from lorry.wire.errors import InvalidRequestError

_RANGE = re.compile(r"(?P<kind>\w+):(?P<first>\d+)-(?P<last>\d+)")
_FIELDS = {option_name(field).removeprefix("--"): field for field in get_type_hints(ActorSettings)}


@dataclass(frozen=True, slots=True)
class PlacedActor:
    name: str
    model: ModelConfig
    settings: ActorSettings


def placed(config: ServeConfig) -> list[PlacedActor]:
    """`config.settings_for` are NAME:OPTION=VALUE, of a model's name or of one actor's, which is NAME#0 and so on; the
    actor's counts. Of a range of devices, as cuda:0-7 is, actors take the next ones in turn, as many as they share
    their model among.

    Raises InvalidRequestError for a name, an option or a value that is none, and where devices do not suffice.
    """
    found = [
        PlacedActor(f"{model.name}#{i}", model, config.actor) for model in config.models for i in range(config.replicas)
    ]
    known = {actor.name for actor in found} | {model.name for model in config.models}
    chosen = [_parse(text, known) for text in config.settings_for]
    found = [replace(actor, settings=_with(actor.settings, chosen, (actor.model.name, actor.name))) for actor in found]
    taken: dict[str, int] = {}
    return [replace(actor, settings=_on_own_devices(actor, taken)) for actor in found]


def _parse(text: str, known: set[str]) -> tuple[str, str, Any]:
    """Of whom, which field, what."""
    left, _, value = text.partition("=")
    name, _, option = left.rpartition(":")
    if name not in known or option not in _FIELDS or not value:
        raise InvalidRequestError.of(
            "for", text, f"NAME:OPTION=VALUE, of {', '.join(sorted(known))} and an actor's option without its dashes"
        )
    field = _FIELDS[option]
    try:
        kind = get_type_hints(ActorSettings, include_extras=True)[field]
        return name, field, msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError.of("for", text, f"another value: {error}") from None


def _with(settings: ActorSettings, chosen: Sequence[tuple[str, str, Any]], names: Sequence[str]) -> ActorSettings:
    """The later of `names` count."""
    return replace(settings, **{field: value for own in names for name, field, value in chosen if name == own})


def _on_own_devices(actor: PlacedActor, taken: dict[str, int]) -> ActorSettings:
    """`taken` counts how many of each range are."""
    devices = actor.settings.device
    if (match := _RANGE.fullmatch(devices)) is None:
        return actor.settings
    first = int(match["first"]) + taken.get(devices, 0)
    taken[devices] = taken.get(devices, 0) + actor.settings.tensor_parallel
    if first + actor.settings.tensor_parallel - 1 > int(match["last"]):
        expected = f"enough devices for all actors: {taken[devices]} are needed up to {actor.name}"
        raise InvalidRequestError.of("device", devices, expected)
    return replace(actor.settings, device=f"{match['kind']}:{first}")
