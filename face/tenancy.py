"""`lorry tenants` and `lorry keys`: who may come in, and how large a share each has."""

from collections.abc import Callable, Sequence
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from lorry import options
from lorry.calling import run_async
from lorry.printing import plain_console
from lorry.service import Service, find_service
from lorry.tables import AsJson, day, print_json, print_table, unix
from lorry.wire.admin_messages import (
    AccessOrder,
    CreateKey,
    CreateTenant,
    EndKey,
    KeyCreated,
    KeyInfo,
    ListKeys,
    ListTenants,
    RemoveTenant,
    SetTenant,
    TenantInfo,
    new_key_id,
)
from lorry.wire.ids import KeyId, TenantId
from lorry.wire.limits import SCOPES

T = TypeVar("T")

tenants = typer.Typer(name="tenants", help="Who is billed, and how large a share each has.", no_args_is_help=True)
keys = typer.Typer(name="keys", help="API keys: every client needs one.", no_args_is_help=True)

ScopeName = StrEnum("ScopeName", list(SCOPES))
Tenant = Annotated[str, typer.Argument(help="As `lorry tenants ls` calls it")]
Weight = Annotated[float, typer.Option(help="One of weight 2 gets twice the tokens of one of 1 while both wait")]


@tenants.command("ls")
def list_tenants(
    as_json: AsJson = False,
    data: options.Data = None,
) -> None:
    """Print who there is."""

    def show(found: list[TenantInfo]) -> None:
        if as_json:
            print_json(found)
        else:
            print_tenants(plain_console(), found)

    carry_out(partial(find_service, None, None, data), ListTenants(), list[TenantInfo], show)


@tenants.command("create")
def create_tenant(
    tenant: Annotated[str, typer.Argument(help="A name")],
    weight: Annotated[float | None, typer.Option(help="Its share beside others [default: what it had, or 1]")] = None,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Make TENANT, who has no key yet. One that was removed is there again, with all that it had but its keys."""
    change(
        CreateTenant(TenantId(tenant), weight),
        partial(find_service, connect, server_key, data),
        f"{tenant} is there{'' if weight is None else f', with a weight of {weight:g}'}.",
    )


@tenants.command("set")
def set_tenant(
    tenant: Tenant,
    weight: Weight,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Change TENANT's share, from now on."""
    change(
        SetTenant(TenantId(tenant), weight),
        partial(find_service, connect, server_key, data),
        f"{tenant} has a weight of {weight:g}.",
    )


@tenants.command("rm")
def remove_tenant(
    tenant: Tenant,
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """Revoke all keys of TENANT, and close what they have opened. What it made stays, and what it used in the bills."""
    change(
        RemoveTenant(TenantId(tenant)),
        partial(find_service, connect, server_key, data),
        f"{tenant} has no keys any more.",
    )


@keys.command("ls")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    as_json: AsJson = False,
    data: options.Data = None,
) -> None:
    """Print what keys there are and were: their names, never themselves."""
    order = ListKeys(TenantId(tenant) if tenant else None)

    def show(found: list[KeyInfo]) -> None:
        if as_json:
            print_json(found)
        else:
            print_keys(plain_console(), found)

    carry_out(partial(find_service, None, None, data), order, list[KeyInfo], show)


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Who uses the key; made if new")],
    name: Annotated[str, typer.Option(help="What `lorry keys ls` and bills call it, beside its id")] = "",
    scope: Annotated[
        list[ScopeName] | None, typer.Option(help="What it may: repeat it for more [default: train, sample, read]")
    ] = None,
    expires: Annotated[
        datetime | None, typer.Option(help="When it opens nothing any more, in UTC [default: never]")
    ] = None,
    data: options.Data = None,
) -> None:
    """Print a new API key of TENANT. It is shown this once: only its hash is stored."""
    chosen: dict[str, Any] = {"scopes": [each.value for each in scope]} if scope else {}
    order = CreateKey(new_key_id(), TenantId(tenant), name, expires_at=unix(expires), **chosen)

    carry_out(partial(find_service, None, None, data), order, KeyCreated, lambda created: print(created.api_key))


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="As `lorry keys ls` calls it")],
    connect: options.Connect = None,
    server_key: options.ServerKey = None,
    data: options.Data = None,
) -> None:
    """End KEY, and close at once what it has opened."""
    change(EndKey(KeyId(key)), partial(find_service, connect, server_key, data), f"{key} opens nothing any more.")


def change(order: AccessOrder, find: Callable[[], Service], done: str) -> None:
    """Carried out, it is `done`."""
    carry_out(find, order, type(None), lambda _: plain_console().print(done, soft_wrap=True))


def carry_out(find: Callable[[], Service], order: AccessOrder, kind: type[T], show: Callable[[T], None]) -> None:
    from lorry.administration import administer

    async def run() -> None:
        show(await administer(find(), order, kind))

    run_async(run)


def print_tenants(console: Console, found: Sequence[TenantInfo]) -> None:
    print_table(("tenant", "weight", "keys", "since", "removed"), map(_tenant_cells, found), console=console)


def _tenant_cells(info: TenantInfo) -> tuple[str, ...]:
    return info.tenant, f"{info.weight:g}", str(info.keys), day(info.created_at), day(info.removed_at)


def print_keys(console: Console, found: Sequence[KeyInfo]) -> None:
    columns = ("key", "tenant", "name", "scopes", "until", "last used")
    print_table(
        columns, map(_key_cells, found), least={"key": len(new_key_id()), "until": 10, "last used": 10}, console=console
    )


def _key_cells(info: KeyInfo) -> tuple[str, ...]:
    until = f"revoked {day(info.revoked_at)}" if info.revoked_at else day(info.expires_at)
    return info.key, info.tenant, info.name, ", ".join(info.scopes), until, day(info.used_at)
