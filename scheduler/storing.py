"""What is kept, for whom, and how much room there is: told to administrators."""

import shutil
from pathlib import Path

from ..storage.connection import FILE
from ..storage.reports import kept_now
from ..storage.store import Store
from ..wire.admin_messages import KeptBy, StorageOverview
from ..wire.ids import TenantId
from .planning.limits import Meters, tenant_holder


def storage(store: Store, meters: Meters, data: Path, now: float) -> StorageOverview:
    """Reads the disk: to be called in a thread."""
    price = store.storage_price() / 1e6
    disk = shutil.disk_usage(data)
    kept = [
        KeptBy(
            tenant=(tenant := TenantId(row["tenant"])),
            project=row["project"],
            checkpoints=row["checkpoints"],
            bytes=row["bytes"],
            usd_a_month=row["bytes"] / 1e9 * price,
            tenant_limit_bytes=meters.limits(tenant_holder(tenant)).stored_bytes,
        )
        for row in kept_now(store, ["tenant", "project"], None, now)
    ]
    size = sum(file.stat().st_size for file in data.glob(f"{FILE}*"))
    return StorageOverview(size, disk.free, disk.total, kept)
