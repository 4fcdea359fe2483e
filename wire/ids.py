"""Names for the identifiers that travel between processes. They are opaque: nobody parses one but its maker."""

from typing import NewType

TenantId = NewType("TenantId", str)
KeyHash = NewType("KeyHash", str)
"""What is kept of an API key: enough to know it again."""
KeyId = NewType("KeyId", str)
"""What a key is called where it must not be shown: it opens nothing."""
ProjectId = NewType("ProjectId", str)
"""What a tenant calls a part of its work: another tenant's of the same name is another."""
SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)
SamplerId = NewType("SamplerId", str)
LaneId = NewType("LaneId", str)
"""A run or a sampler: what a command's `seq` counts in."""
FutureId = NewType("FutureId", str)
"""`LANE:SEQ`, so that a command that is sent twice is the same future by construction."""
ActorId = NewType("ActorId", str)
BatchId = NewType("BatchId", int)


def future_id(lane: LaneId, seq: int) -> FutureId:
    return FutureId(f"{lane}:{seq}")
