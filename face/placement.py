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

    Raises InvalidRequestError for a name, an option or a value that is none, for a name that two models have, and where
    devices do not suffice.
    """
    names = [model.name for model in config.models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequestError.of("model", twice, "a name for each; NAME=PATH_OR_HUB_ID gives another")
    found = [
        PlacedActor(f"{model.name}#{i}", model, config.actor) for model in config.models for i in range(config.replicas)
    ]
    known = {actor.name for actor in found} | {model.name for model in config.models}
    chosen = [_parse(text, known) for text in config.settings_for]
    found = [replace(actor, settings=_with(actor.settings, chosen, (actor.model.name, actor.name))) for actor in found]
    taken = {device for actor in found for device in _fixed(actor.settings)}
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


def _fixed(settings: ActorSettings) -> list[tuple[str, int]]:
    """The devices that an actor is given by name."""
    kind, _, index = settings.device.partition(":")
    first = int(index) if index.isdecimal() else 0
    named = not index or index.isdecimal()
    return [(kind, first + rank) for rank in range(settings.tensor_parallel)] if named else []


def _on_own_devices(actor: PlacedActor, taken: set[tuple[str, int]]) -> ActorSettings:
    """Of a range, the next that are nobody's, side by side."""
    settings = actor.settings
    if (match := _RANGE.fullmatch(settings.device)) is None:
        return settings
    kind, first, last = match["kind"], int(match["first"]), int(match["last"])
    for start in range(first, last - settings.tensor_parallel + 2):
        wanted = {(kind, start + rank) for rank in range(settings.tensor_parallel)}
        if not wanted & taken:
            taken |= wanted
            return replace(settings, device=f"{kind}:{start}")
    expected = f"enough devices: {actor.name} wants {settings.tensor_parallel} side by side, and there are none left"
    raise InvalidRequestError.of("device", settings.device, expected)
