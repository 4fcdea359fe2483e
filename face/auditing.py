"""`lorry audit`: who did what to what others depend on, whether the service runs or not."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console

from lorry import options
from lorry.calling import call
from lorry.config import default_data
from lorry.printing import plain_console
from lorry.storage.looking import looking
from lorry.tables import AsJson, print_json, print_table, unix
from lorry.wire.ids import TenantId
from lorry.wire.types import AuditEvent


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    since: Annotated[datetime | None, typer.Option(help="In UTC")] = None,
    until: Annotated[datetime | None, typer.Option(help="In UTC; what happened at that moment is not in it")] = None,
    as_json: AsJson = False,
    data: options.Data = None,
) -> None:
    """Print who made, published, deleted or took away what, and who changed keys, tenants and limits."""

    def run() -> None:
        with looking(data or default_data()) as store:
            found = store.audit(TenantId(tenant) if tenant else None, unix(since), unix(until))
        if as_json:
            print_json(found)
        else:
            print_audit(plain_console(), found)

    call(run)


def print_audit(console: Console, found: Sequence[AuditEvent]) -> None:
    print_table(
        ("when", "tenant", "by", "what", "of"),
        map(_cells, found),
        least={"when": 10, "by": 16, "what": 14},
        console=console,
    )


def _cells(event: AuditEvent) -> tuple[str, ...]:
    when = datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    detail = ", ".join(f"{name} {value}" for name, value in event.detail.items() if value)
    return when, event.tenant, event.by, event.event, f"{event.subject} ({detail})" if detail else event.subject
