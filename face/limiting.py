"""`lorry limits`: how much a tenant, a project, a key, or everyone may have."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from lorry import options
from lorry.printing import plain_console
from lorry.service import find_service
from lorry.tables import AsJson, print_json, print_table
from lorry.tenancy import carry_out, change
from lorry.wire.admin_messages import LimitsInfo, ListLimits, SetLimits
from lorry.wire.limits import Limits

limits = typer.Typer(name="limits", help="How much a tenant, a key, or everyone may have.", no_args_is_help=True)


@limits.command("ls")
def list_limits(as_json: AsJson = False, data: options.Data = None) -> None:
    """Print who has which limits."""

    def show(found: list[LimitsInfo]) -> None:
        if as_json:
            print_json(found)
        else:
            print_limits(plain_console(), found)

    carry_out(partial(find_service, None, None, data), ListLimits(), list[LimitsInfo], show)


@limits.command("set")
def set_limits(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant, in place of everyone's")] = None,
    project: Annotated[str | None, typer.Option(help="Of this TENANT/PROJECT, beside its tenant's")] = None,
    key: Annotated[
        str | None, typer.Option(help="Of this key, beside its tenant's, as `lorry keys ls` calls it")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=0, help="Active runs: that had a request within the hour")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Of an adapter")] = None,
    queued_tokens: Annotated[int | None, typer.Option(min=0, help="Of requests that wait or run")] = None,
    requests_per_s: Annotated[float | None, typer.Option(min=0, help="Commands and changes, after a burst")] = None,
    concurrent_samples: Annotated[int | None, typer.Option(min=0, help="Sequences at the same time")] = None,
    stored_bytes: Annotated[int | None, typer.Option(min=0, help="Of checkpoints with names")] = None,
    monthly_usd: Annotated[float | None, typer.Option(min=0, help="In a calendar month of UTC")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A base model that may be used; repeat it for more")] = None,
    training_ttl_s: Annotated[
        int | None, typer.Option(min=1, help="For a training state that is saved without one")
    ] = None,
    sampler_ttl_s: Annotated[
        int | None, typer.Option(min=1, help="For sampler weights that are saved without one")
    ] = None,
    external_ttl_s: Annotated[int | None, typer.Option(min=1, help="For weights to be downloaded, without one")] = None,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Checkpoints with names, of each kind, that a run keeps")
    ] = None,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Limit everyone, or one tenant, project or key: what is not said is not limited any more."""
    if sum(map(bool, (tenant, project, key))) > 1:
        raise typer.BadParameter("a tenant, a project and a key have limits of their own: set one after the other")
    said: dict[str, Any] = {
        "runs": runs,
        "rank": rank,
        "queued_tokens": queued_tokens,
        "requests_per_s": requests_per_s,
        "concurrent_samples": concurrent_samples,
        "stored_bytes": stored_bytes,
        "monthly_usd": monthly_usd,
        "models": model,
        "training_ttl_s": training_ttl_s,
        "sampler_ttl_s": sampler_ttl_s,
        "external_ttl_s": external_ttl_s,
        "keep_last": keep_last,
    }
    named = {"tenant": tenant, "project": project, "key": key}
    holder = next((f"{kind}:{name}" for kind, name in named.items() if name), "everyone")
    wanted = Limits(**said)
    find = partial(find_service, connect, server_key, data)
    change(SetLimits(holder, wanted), find, f"{holder}: {_told(wanted) or 'no limits of its own'}.")


def print_limits(console: Console, found: Sequence[LimitsInfo]) -> None:
    rows = [(info.holder, _told(info.limits)) for info in found]
    print_table(("holder", "limits"), rows, console=console)


def _told(wanted: Limits) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in msgspec.to_builtins(wanted).items())


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}"
