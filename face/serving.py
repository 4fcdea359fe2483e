"""`lorry serve` and `lorry demo`: what somebody meets first."""

import os
import signal
import sys
from dataclasses import replace
from typing import Annotated

import anyio
import typer
from anyio import to_thread

from lorry import options
from lorry.actors.config import ActorSettings
from lorry.calling import run_async
from lorry.config import DEMO_SETTINGS, ModelConfig, ServeConfig, default_data, demo_model, parse_weights
from lorry.gateway.config import HttpSettings
from lorry.printing import plain_console
from lorry.wire.ids import TenantId

DEMO_TENANT = TenantId("demo")
WHICH_MODEL = """\
lorry serve needs a base model: its weights, configuration and tokenizer as Hugging Face's transformers saves them.
Each is served under a public name, which scripts ask for. It is given as --model, once for each:

  lorry serve --model ./my-model                  a folder, under its own name
  lorry serve --model Qwen/Qwen3-0.6B             a hub id, under that name; it is downloaded
  lorry serve --model small=Qwen/Qwen3-0.6B       either, under another name

`lorry plan MODEL` says what a model takes of memory before anything is loaded. A small one ships with Lorry:

  lorry serve --demo                              jargon-1m, of 1.4 million parameters, with a key to begin with
"""


ANOTHER_KEY = f"Tenant {DEMO_TENANT} has a key; `lorry keys create --tenant {DEMO_TENANT}` makes another."


def demo_is_wanted() -> bool:
    """Tells what was not said. Somebody who reads it is asked; a script is told, and ended with 2."""
    typer.echo(WHICH_MODEL, err=True)
    if sys.stdin.isatty() and sys.stderr.isatty():
        if typer.confirm("Serve the demo's model now?", default=True, err=True):
            return True
    else:
        typer.echo("lorry: no --model was given, and no --demo", err=True)
    raise typer.Exit(2)


def demo() -> None:
    """Two tenants train and sample one base model, all on this machine, in a minute or two."""
    from lorry.demo import main

    run_async(main)


@options.with_http_settings
@options.with_actor_settings
def serve(
    model: options.Models = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve jargon-1m, which ships with Lorry, and make a key")
    ] = False,
    data: options.Data = None,
    bind: options.Bind = options.LOCAL_BROKER,
    http: options.Http = "127.0.0.1:8000",
    no_http: Annotated[bool, typer.Option("--no-http", help="Serve Lorry's own clients only")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Actors for each model")] = 1,
    prices: options.Prices = None,
    heartbeat_s: options.Heartbeat = 5.0,
    spread_after_s: options.SpreadAfter = 10.0,
    model_weight: options.ModelWeight = None,
    sessions_per_tenant: options.SessionsPerTenant = 500,
    grace_s: options.Grace = 30.0,
    settings_for: options.SettingsFor = None,
    *,
    settings: ActorSettings,
    http_settings: HttpSettings,
) -> None:
    """Serve base models: starts a broker, a gateway and an actor for each model as child processes."""
    from lorry.administration import first_admin_key, first_key_of
    from lorry.serve import serving

    demo = demo or (not model and demo_is_wanted())
    if demo and not model and settings.threads is None:
        settings = replace(settings, threads=DEMO_SETTINGS.threads)

    async def run() -> None:
        models = (*(ModelConfig.parse(text) for text in model or ()), *((demo_model(),) if demo else ()))
        config = ServeConfig(
            models=models,
            data=data or default_data(),
            bind=bind,
            http=None if no_http else http,
            replicas=replicas,
            actor=settings,
            prices=prices,
            heartbeat_s=heartbeat_s,
            spread_after_s=spread_after_s,
            model_weights=parse_weights(model_weight, [model.name for model in models]),
            sessions_per_tenant=sessions_per_tenant,
            grace_s=grace_s,
            log_level=os.environ["LORRY_LOG_LEVEL"],
            settings_for=tuple(settings_for or ()),
            http_settings=http_settings,
        )
        console = plain_console()

        def say(line: str) -> None:
            console.print(line, soft_wrap=True)

        with console.status("Loading the models…") as progress:
            async with serving(config) as deployment:
                progress.stop()
                names = ", ".join(model.name for model in config.models)
                say(f"Serving {names} at {deployment.address}, data in {config.data}. Ctrl-C stops it.")
                if deployment.url:
                    say(f"Scripts for Tinker run with TINKER_BASE_URL={deployment.url}")
                    say(f"The console is at {deployment.url}/console")
                if deployment.server_key:
                    say(f"Clients pass server_key={deployment.server_key!r}: the connection is encrypted.")
                if first := await to_thread.run_sync(first_admin_key, config.data):
                    say(f"Administrator's key, shown this once: {first}")
                if demo:
                    key = await to_thread.run_sync(first_key_of, config.data, DEMO_TENANT)
                    say(f"Key of tenant {DEMO_TENANT}, shown this once: {key}" if key else ANOTHER_KEY)
                with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                    async for _ in signals:
                        break

    run_async(run)
