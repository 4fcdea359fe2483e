"""A checkpoint that is lent is its owner's all the while, and its borrower's for a minute."""

from pathlib import Path

import pytest

import lorry
from lorry.client.connection import open_connection
from lorry.scheduler.registry import LENT_FOR_S, Registry
from lorry.storage.rows import CheckpointRow
from lorry.wire.catalogue_messages import LendCheckpoint
from lorry.wire.errors import NotFoundError
from lorry.wire.ids import RunId, TenantId

from .test_client_door import Serving

ALICE, BOB, EVE = TenantId("alice"), TenantId("bob"), TenantId("eve")
PATH = "tinker://run-1/weights/a"
ROW = CheckpointRow(PATH, RunId("run-1"), ALICE, "training", "a", "folder", 1, 1, "", 0.0, None)


def test_it_is_lent_for_a_minute_to_one_tenant_and_nobody_else() -> None:
    clock = [0.0]
    registry = Registry(("m",), lambda: clock[0])
    registry.add_checkpoint(ROW)
    assert registry.lend(PATH, BOB)
    assert not registry.lend(PATH, BOB), "it is lent already"
    assert registry.readable(BOB, PATH) is ROW
    with pytest.raises(NotFoundError):
        registry.readable(EVE, PATH)
    with pytest.raises(NotFoundError):
        registry.checkpoint(BOB, PATH)
    clock[0] = LENT_FOR_S
    with pytest.raises(NotFoundError):
        registry.readable(BOB, PATH)
    assert registry.lend(PATH, BOB)


async def test_only_its_owner_lends_it_and_the_owners_log_tells_so(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        path = (await client.create_lora_training_client_async("m", rank=4)).save_state("a")
        saved = (await path).path
        stranger = service.store.create_key(EVE, 1.0)
        async with open_connection(service.address, stranger) as eve:
            with pytest.raises(NotFoundError):
                await eve.tell(LendCheckpoint(eve.next_request(), saved, EVE))
        async with open_connection(service.address, service.key) as alice:
            for _ in range(3):
                await alice.tell(LendCheckpoint(alice.next_request(), saved, BOB))
        told = [event for event in service.store.audit("alice", 0.0, 1e12) if event.event == "checkpoint_lent"]
        assert [(event.subject, event.detail) for event in told] == [(saved, {"to": "bob"})]
