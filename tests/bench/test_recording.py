"""What a service did, as a workload."""

from typing import Any

import msgspec
import pytest

from lorry.bench.recording import recorded
from lorry.bench.sweep import scaled
from lorry.bench.workload import Recorded, Sample, Tenant, Train, parse_workload
from lorry.wire.errors import InvalidRequestError, NotFoundError

from .stub import Stub, driven


def request(lane: str, tenant: str, at: float, **more: Any) -> dict[str, Any]:
    none = dict.fromkeys(("trained", "prompt", "sampled", "rank", "base", "train_mlp", "train_attn", "train_unembed"))
    return {"lane": lane, "tenant": tenant, "kind": "sample", "rows": 1, "submitted_at": at, "step": 0} | none | more


DONE = [
    request("run-1", "alice", 1000.0, kind="forward_backward", rows=4, trained=100, step=1, rank=16),
    request("sampler-1", "bob", 1000.5, rows=3, prompt=70, sampled=30, base=1),
    request("run-1", "alice", 1002.0, kind="forward_backward", rows=1, trained=7, rank=16),
    request("run-2", "alice", 1002.25, kind="forward_backward", rows=1, trained=9, rank=32, train_mlp=0, train_attn=1),
    request("sampler-1", "bob", 1003.0, rows=1, prompt=70, sampled=0, base=1),
]


def test_requests_are_as_large_and_as_far_apart_as_they_were_and_nobody_is_named() -> None:
    workload = recorded("monday", "a-model", DONE)
    assert workload.tenants == [
        Tenant("tenant-0-0", [Train(4, 25), Train(1, 7, step=False)], Recorded([0.0, 2.0]), rank=16),
        Tenant("tenant-1-1", [Sample(70, 0, 10, 3, True), Sample(70, 0, 1, 1, True)], Recorded([0.5, 3.0]), rank=8),
        Tenant("tenant-0-2", [Train(1, 9, step=False)], Recorded([2.25]), rank=32, train_mlp=False),
    ]
    assert (workload.duration_s, workload.warm_up_s) == (4.0, 0.0)
    text = msgspec.json.encode(workload).decode()
    assert parse_workload(text, is_json=True) == workload
    assert "alice" not in text and "run-1" not in text


def test_they_are_sent_again_at_their_times_and_at_twice_the_load_in_half_of_it() -> None:
    workload = recorded("monday", "a-model", DONE)
    for scale in (1.0, 2.0):
        records = driven(scaled(workload, scale), Stub(lambda name, n: 5.0))
        found = sorted((record.due_s, record.tenant, record.kind) for record in records)
        assert found == [
            (0.0, "tenant-0-0", "train"),
            (0.5 / scale, "tenant-1-1", "sample"),
            (2.0 / scale, "tenant-0-0", "train"),
            (2.25 / scale, "tenant-0-2", "train"),
            (3.0 / scale, "tenant-1-1", "sample"),
        ]
        assert sorted(record.tokens for record in records if record.kind == "train") == [7, 9, 100]


def test_times_that_are_not_those_of_the_work_are_refused() -> None:
    workload = recorded("monday", "a-model", DONE)
    for wrong in ([0.0], [2.0, 0.0]):
        first = msgspec.structs.replace(workload.tenants[0], arrival=Recorded(wrong))
        text = msgspec.json.encode(msgspec.structs.replace(workload, tenants=[first])).decode()
        with pytest.raises(InvalidRequestError, match=r"arrival\.at_s.*2 times in order"):
            parse_workload(text, is_json=True)


def test_where_nothing_was_done_there_is_nothing_to_record() -> None:
    with pytest.raises(NotFoundError, match="a-model has no finished pass or sample"):
        recorded("monday", "a-model", [])
