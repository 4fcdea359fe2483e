"""Settings as words of a command line, as the supervisor writes and `lorry actor` and `lorry gateway` read them."""

from dataclasses import fields

from lorry.actors.config import ActorSettings
from lorry.gateway.config import HttpSettings


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def arguments_of(settings: ActorSettings | HttpSettings) -> list[str]:
    """A switch is there or not; None, which is a default that depends on the machine, is left out."""
    words: list[str] = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is True:
            words.append(option_name(field.name))
        elif value is not None and value is not False:
            words += [option_name(field.name), str(value)]
    return words
