"""The `lorry` command. Each subcommand parses its arguments into a configuration and calls one function."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorry import (
    auditing,
    benching,
    billing,
    checkpoints,
    jobs,
    limiting,
    logs,
    metrics,
    options,
    runs,
    serving,
    storing,
    tables,
    tenancy,
    top,
    tracing,
)
from lorry.actors.config import ActorConfig, ActorSettings
from lorry.addresses import check_exposure, host_and_port, is_loopback
from lorry.calling import call, run_async
from lorry.config import ModelConfig, chosen_prices, default_data, parse_weights
from lorry.gateway.config import GatewayConfig, HttpSettings
from lorry.keys import actor_token, curve_keys, link_key, operator_key
from lorry.printing import plain_console
from lorry.scheduler.config import BrokerConfig
from lorry.versions import print_versions
from lorry.wire.ids import ActorId, TenantId
from lorry.wire.types import Quantization

if TYPE_CHECKING:
    from lorry.doctor import Finding

app = typer.Typer(
    help="One base model, many LoRAs on board: train and sample LoRA adapters of many tenants on shared base models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (tenancy.tenants, tenancy.keys, limiting.limits, checkpoints.checkpoints, metrics.metrics, benching.app):
    app.add_typer(group)
for command in (serving.demo, serving.serve, jobs.jobs, runs.runs, top.top, billing.usage):
    app.command(command.__name__)(command)
for command in (storing.storage, auditing.audit, tracing.trace):
    app.command(command.__name__)(command)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_versions, is_eager=True, help="Print what is installed")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error; logs go to standard error")] = "info",
) -> None:
    """One base model, many LoRAs on board."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"{log_level!r} is none of debug, info, warning, error", param_hint="--log-level")
    logs.configure(log_level)
    os.environ["LORRY_LOG_LEVEL"] = log_level


@app.command()
def broker(
    model: Annotated[list[str], typer.Option("--model", help="Public name of a base model that actors will serve")],
    data: options.Data = None,
    bind: options.Bind = options.LOCAL_BROKER,
    actor_bind: Annotated[
        str, typer.Option(help="Where actors connect; beyond loopback it is encrypted")
    ] = "tcp://127.0.0.1:*",
    prices: options.Prices = None,
    heartbeat_s: options.Heartbeat = 5.0,
    spread_after_s: options.SpreadAfter = 10.0,
    model_weight: options.ModelWeight = None,
    sessions_per_tenant: options.SessionsPerTenant = 500,
    supervised: options.Supervised = False,
) -> None:
    """Run a broker alone; actors join it with the token in LORRY_ACTOR_TOKEN."""
    from lorry.processes import run_broker

    folder = data or default_data()

    def configured() -> BrokerConfig:
        return BrokerConfig(
            data=folder,
            models=tuple(model),
            actor_token=actor_token(),
            operator_key=operator_key(folder),
            bind=bind,
            actor_bind=actor_bind,
            curve=None if is_loopback(bind) else curve_keys(folder),
            actor_curve=None if is_loopback(actor_bind) else curve_keys(folder),
            heartbeat_s=heartbeat_s,
            spread_after_s=spread_after_s,
            sessions_per_tenant=sessions_per_tenant,
            prices=chosen_prices(prices, model),
            model_weights=parse_weights(model_weight, model),
        )

    run_async(lambda: run_broker(configured, supervised))


@app.command()
@options.with_actor_settings
def actor(
    model: Annotated[str, typer.Option("--model", help="[NAME=]PATH_OR_HUB_ID")],
    connect: Annotated[str, typer.Option(help="The broker's address for actors")],
    name: Annotated[str, typer.Option(help="Unique among the broker's actors")] = "actor",
    server_key: options.ServerKey = None,
    supervised: options.Supervised = False,
    *,
    settings: ActorSettings,
) -> None:
    """Run one actor alone, and join the broker at CONNECT with the token in LORRY_ACTOR_TOKEN."""
    from lorry.processes import run_actor

    parsed = ModelConfig.parse(model)
    config = ActorConfig(
        actor=ActorId(name),
        base_model=parsed.name,
        model=parsed.source,
        connect=connect,
        token=actor_token(),
        server_key=server_key,
        settings=settings,
    )
    run_async(lambda: run_actor(config, supervised))


@app.command()
@options.with_http_settings
def gateway(
    connect: Annotated[str, typer.Option(help="The broker's address for clients")] = options.LOCAL_BROKER,
    http: options.Http = "127.0.0.1:8000",
    data: Annotated[
        Path | None, typer.Option("--data", help="The broker's data folder, to download checkpoints from")
    ] = None,
    server_key: options.ServerKey = None,
    url: Annotated[str | None, typer.Option(help="How clients reach this gateway, if by another address")] = None,
    supervised: options.Supervised = False,
    *,
    http_settings: HttpSettings,
) -> None:
    """Run a gateway alone: the HTTP server for the Tinker SDK, a client of the broker at CONNECT."""
    from lorry.processes import run_gateway

    def configured() -> GatewayConfig:
        check_exposure(http, http_settings)
        host, port = host_and_port(http)
        return GatewayConfig(
            connect=connect,
            host=host,
            port=port,
            server_key=server_key,
            checkpoints=data / "checkpoints" if data else None,
            link_key=link_key(data) if data else b"",
            url=url,
            http=http_settings,
        )

    run_async(lambda: run_gateway(configured, supervised), uvloop=True)


@app.command()
def status(as_json: tables.AsJson = False, data: options.Data = None) -> None:
    """Print actors, runs, queues and tenants."""
    from lorry.reports import print_status, print_status_as_json

    if as_json:
        call(lambda: print_status_as_json(data or default_data()))
    else:
        call(lambda: print_status(plain_console(), data or default_data()))


@app.command()
def drain(
    actor: Annotated[str, typer.Argument(help="As `lorry status` calls it")],
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Have ACTOR end what it holds, save its runs and go; they go on in another, or in its successor.

    Clients see a pause. Under `lorry serve` a successor starts at once. It fails where ACTOR died before it had saved
    all, or where the connection was lost so that nobody can tell.
    """
    from lorry.client.operator import drain as drain_actor
    from lorry.service import find_service

    async def run() -> None:
        service = find_service(connect, server_key, data)
        await drain_actor(service.address, service.server_key, operator_key(service.data), ActorId(actor))
        plain_console().print(f"{actor} has left.", soft_wrap=True)

    run_async(run)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, a hub id, or a name of docs/models.md")],
    gpus: Annotated[int, typer.Option(min=1, help="Devices that there are")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="GiB of each: whether it fits, and what with")] = None,
    dtype: Annotated[str, typer.Option(help="The base model's: float32, bfloat16, float16")] = "bfloat16",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters that are to fit")] = 32,
    quantize: Annotated[Quantization, typer.Option(help="As `lorry serve` has it")] = "none",
    as_json: tables.AsJson = False,
) -> None:
    """Print what a base model and its adapters take of memory, from its configuration alone: no weights are read."""
    from lorry.plan import Devices, foresee, print_plan

    def run() -> None:
        devices = None if gpu_memory is None else Devices(gpus, gpu_memory)
        found = foresee(model, dtype, rank, devices, quantize)
        tables.print_json(found) if as_json else print_plan(plain_console(), found)

    call(run)


@app.command()
def export(
    path: Annotated[str, typer.Argument(help="tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME")],
    destination: Annotated[Path, typer.Argument(help="A new folder")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a model: the base with the adapter in it")] = False,
    base: Annotated[
        str | None, typer.Option(help="The base: a folder or hub id [default: the name that it is served under]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a merged model: float32, bfloat16, float16 [default: the base's own]")
    ] = None,
    data: options.Data = None,
) -> None:
    """Write a checkpoint's adapter to DESTINATION, as PEFT and vLLM load it, or merged into its base model.

    It may run while the service does.
    """
    from lorry.export import Merge
    from lorry.export import export as export_to

    if dtype and not merge:
        raise typer.BadParameter("is a merged model's: give --merge, too", param_hint="--dtype")

    def run() -> None:
        note = export_to(data or default_data(), path, destination, base, Merge(dtype) if merge else None)
        plain_console().print(f"Exported to {destination}.", *([note] if note else []), soft_wrap=True)

    call(run)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="With an adapter_config.json and an adapter_model.safetensors")],
    tenant: Annotated[str, typer.Option(help="Whose it is to be")],
    name: Annotated[str | None, typer.Option(help="Of its checkpoints [default: the folder's]")] = None,
    model: Annotated[
        str | None, typer.Option(help="The name that its base is served under [default: what the adapter calls it]")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base: a folder or hub id [default: that name]")] = None,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Make checkpoints of an adapter that PEFT trained: one to train on from, and one to sample from.

    The service runs meanwhile; the adapter's folder is read, and not needed afterwards.
    """
    from lorry.importing import Given, import_folder
    from lorry.service import find_service

    given = Given(folder, TenantId(tenant), name or folder.resolve().name, model, base)

    async def run() -> None:
        imported = await import_folder(given, find_service(connect, server_key, data))
        print(imported.training_path)
        print(imported.sampler_path)

    run_async(run)


@app.command()
def doctor(as_json: tables.AsJson = False, data: options.Data = None) -> None:
    """Check the database, its files, checkpoints and saved states against each other; exit 1 where something is wrong.

    It changes nothing, and may run while the service does.
    """
    from lorry.doctor import examine

    folder = data or default_data()
    well = f"All that is named in {folder} is there, and is what was written."
    call(lambda: _report(examine(folder), well, as_json))


@app.command()
def backup(
    destination: Annotated[Path, typer.Argument(help="A new folder")],
    data: options.Data = None,
) -> None:
    """Copy the data as it is at this moment to DESTINATION, while the service runs; and check the copy."""
    from lorry.backup import back_up

    call(lambda: _report(back_up(data or default_data(), destination), f"Backed up to {destination}, and checked."))


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(help="A folder that `lorry backup` made")],
    data: options.Data = None,
) -> None:
    """Copy BACKUP to the data folder, which must be new; `lorry serve` goes on from there."""
    from lorry.backup import restore as restore_to

    def run() -> None:
        restore_to(backup, folder := data or default_data())
        plain_console().print(f"Restored to {folder}.", soft_wrap=True)

    call(run)


def _report(findings: "Sequence[Finding]", well: str, as_json: bool = False) -> None:
    """Prints what is wrong, and ends with 1; where nothing is, that all is `well`."""
    from lorry.reports import print_findings

    if as_json:
        tables.print_json(findings)
    elif findings:
        print_findings(plain_console(), findings)
    else:
        plain_console().print(well, soft_wrap=True)
    if findings:
        sys.exit(1)
