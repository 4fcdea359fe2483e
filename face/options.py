"""The options that several subcommands share, each with its help, and all of an actor's and of HTTP's, made of
ActorSettings and HttpSettings."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from lorry.actors.config import ActorSettings
from lorry.arguments import option_name
from lorry.gateway.config import HttpSettings

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Where the database and checkpoints lie [default: $LORRY_DATA or the user's data folder]"
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="[NAME=]PATH_OR_HUB_ID: a folder or hub id, and the public name to serve it under"),
]
Bind = Annotated[str, typer.Option(help="Where clients connect, as tcp://HOST:PORT; beyond loopback it is encrypted")]
Http = Annotated[str, typer.Option(help="Where scripts written for the Tinker SDK connect, as HOST:PORT")]
Heartbeat = Annotated[float, typer.Option(min=0.05, help="Seconds between signs of life; three missed are a death")]
ModelWeight = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=WEIGHT: of a device that several models share, one of weight 2 gets twice the time of one of 1"
    ),
]
SpreadAfter = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds of one replica beyond which a pass is divided among those that are free; inf: none"
    ),
]
Grace = Annotated[
    float,
    typer.Option(min=0, help="Seconds that actors have to end what they hold and save their runs when it stops"),
]
SettingsFor = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        help="NAME:OPTION=VALUE: an actor's option for one model alone, as big:tensor-parallel=4, or for one actor of "
        "its --replicas, as big#1:device=cuda:1",
    ),
]
Prices = Annotated[
    str | None,
    typer.Option(
        help="tinker, the list that ships with Lorry, or a TOML file, USD per million tokens: ['NAME'] prefill = 0.1, "
        "sample = 0.4, train = 0.4 [default: all is free]"
    ),
]
SessionsPerTenant = Annotated[
    int, typer.Option(min=1, help="Connections of a tenant that are open at the same time; more are told to wait")
]
LOCAL_BROKER = "tcp://127.0.0.1:5570"
Connect = Annotated[
    str | None,
    typer.Option(help="The broker's address for clients [default: where the one listens that serves the data folder]"),
]
ServerKey = Annotated[str | None, typer.Option(help="The broker's public key, where it is not on loopback")]
Supervised = Annotated[bool, typer.Option(hidden=True, help="Stop when standard input closes")]


def with_actor_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each field of ActorSettings in place of its parameter `settings`."""
    return _with_fields(command, "settings", ActorSettings)


def with_http_settings(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each field of HttpSettings in place of its parameter `http_settings`."""
    return _with_fields(command, "http_settings", HttpSettings)


def _with_fields(command: Callable[..., None], name: str, kind: type[Any]) -> Callable[..., None]:
    @wraps(command)
    def collected(**given: Any) -> None:
        chosen = {field.name: given.pop(field.name) for field in fields(kind)}
        command(**given, **{name: kind(**chosen)})

    own = [parameter for parameter in signature(command).parameters.values() if parameter.name != name]
    parameters = [*own, *_options_of(kind)]
    collected.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(collected)["__signature__"] = Signature(parameters)  # where typer, as everybody, looks for parameters
    return collected


def _options_of(settings: type[Any]) -> list[Parameter]:
    options: list[Parameter] = []
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        kind, meta = get_args(hints[field.name])
        option = typer.Option(option_name(field.name), min=meta.ge, max=meta.le, help=meta.description)
        annotation = Annotated[kind, option]
        options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation))
    return options
