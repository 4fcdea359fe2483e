"""`lorry audit`: who did what to what others depend on, whether the service runs or not."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from lorry import options
from lorry.calling import call
from lorry.config import default_data
from lorry.storage.looking import looking
from lorry.tenancy import AsJson, print_json, print_table
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
    start, end = (None if moment is None else moment.replace(tzinfo=UTC).timestamp() for moment in (since, until))

    def run() -> None:
        with looking(data or default_data()) as store:
            found = store.audit(TenantId(tenant) if tenant else None, start, end)
        if as_json:
            print_json(found)
        else:
            print_table(("when", "tenant", "by", "what", "of"), map(_cells, found))

    call(run)


def _cells(event: AuditEvent) -> tuple[str, ...]:
    when = datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
    detail = ", ".join(f"{name} {value}" for name, value in event.detail.items() if value)
    return when, event.tenant, event.by, event.event, f"{event.subject} ({detail})" if detail else event.subject
