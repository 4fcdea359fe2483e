"""What came into a tenant's runs: loads as the journal has them, copies and imports as the record of deeds does."""

import json
from typing import Any

from ..wire.client_messages import CommandArguments
from ..wire.codec import decode
from ..wire.ids import RunId, TenantId
from ..wire.lineage import Descent
from .store import Store

_LOADS = (
    "SELECT lane AS run, seq, arguments, finished_at AS at, EXISTS (SELECT 1 FROM commands AS earlier"
    "  WHERE earlier.lane = commands.lane AND earlier.seq < commands.seq"
    "  AND earlier.kind = 'optim_step' AND earlier.state = 'done') AS stepped"
    " FROM runs JOIN commands ON commands.lane = runs.id AND commands.kind = 'load_state'"
    " WHERE runs.tenant = ?1 AND (?2 IS NULL OR runs.id = ?2) AND commands.state = 'done' ORDER BY at, lane, seq"
)
_DEEDS = (
    "SELECT at, event, subject, detail FROM audit WHERE tenant = ?"
    " AND event IN ('checkpoint_copied', 'adapter_imported') ORDER BY id"
)


def lineage(store: Store, tenant: TenantId, run: RunId | None = None) -> list[Descent]:
    """Of all of the tenant's runs, or of one, in the order in which it came. Of another tenant's checkpoint the path
    alone is told, which whoever loaded it knows."""
    with store.snapshot():
        deeds = [_of_deed(row) for row in store.rows(_DEEDS, tenant)]
        loads = [_of_load(row) for row in store.rows(_LOADS, tenant, run)]
    wanted = [each for each in (*deeds, *loads) if run in (None, each.run)]
    found: list[Descent] = []
    begun = set[RunId]()
    for each in sorted(wanted, key=lambda each: each.at):
        found.append(each if each.run not in begun else _later(each))
        begun.add(each.run)
    return found


def _of_load(row: dict[str, Any]) -> Descent:
    told = decode(row["arguments"], CommandArguments)
    return Descent(RunId(row["run"]), told.path, row["at"], told.optimizer, "load", not row["stepped"])


def _of_deed(row: dict[str, Any]) -> Descent:
    """A copy has all that its source has; what was trained elsewhere comes without an optimizer."""
    if row["event"] == "adapter_imported":
        return Descent(RunId(row["subject"]), None, row["at"], False, "import", True)
    run = row["subject"].removeprefix("tinker://").partition("/")[0]
    whole = "/weights/" in row["subject"]
    return Descent(RunId(run), json.loads(row["detail"])["source"], row["at"], whole, "copy", True)


def _later(each: Descent) -> Descent:
    return Descent(each.run, each.path, each.at, each.with_optimizer, each.way, False)
