"""What runs began from: loads, copies and imports, each told to whose run it is, with no more than its path."""

from pathlib import Path

import lorry
from lorry.client.connection import Connection, open_connection
from lorry.client.rest import RestClient
from lorry.wire.catalogue_messages import CheckpointCopied, CopyCheckpoint, PublishCheckpoint
from lorry.wire.ids import TenantId
from lorry.wire.types import AdamParams

from .test_client_door import DATUM, Serving


async def lines(rest: RestClient, run: str | None = None) -> list[tuple[object, ...]]:
    found = await rest.get_lineage_async(run)
    return [(each.run, each.path, each.with_optimizer, each.way, each.parent) for each in found]


async def copied(connection: Connection, path: str) -> str:
    copy = CopyCheckpoint(connection.next_request(), "copy", path)
    return (await connection.ask(copy, CheckpointCopied)).path


async def test_a_runs_first_load_before_any_step_is_its_parent_and_all_others_are_told(tmp_path: Path) -> None:
    async with Serving(tmp_path) as service, lorry.connect(service.address, api_key=service.key) as client:
        service.may_work.set()
        rest = client.create_rest_client()
        first, child, stepped, apart = [
            await client.create_lora_training_client_async("m", rank=4, seed=seed) for seed in range(4)
        ]
        path = (await first.save_state("base")).path
        await child.forward_backward([DATUM], "cross_entropy")  # no step
        await child.load_state_with_optimizer(path)
        await child.load_state(path)
        await stepped.forward_backward([DATUM], "cross_entropy")
        await stepped.optim_step(AdamParams())
        await stepped.load_state(path)
        expected = [
            (child.model_id, path, True, "load", True),
            (child.model_id, path, False, "load", False),
            (stepped.model_id, path, False, "load", False),
        ]
        assert await lines(rest) == expected
        assert await lines(rest, child.model_id) == expected[:2]
        assert await lines(rest, apart.model_id) == []


async def test_of_anothers_checkpoint_the_path_is_told_to_who_loaded_it_and_nothing_to_whose_it_is(
    tmp_path: Path,
) -> None:
    async with Serving(tmp_path) as service:
        service.may_work.set()
        bobs_key = service.store.create_key(TenantId("bob"), 1.0)
        async with (
            lorry.connect(service.address, api_key=service.key) as alice,
            open_connection(service.address, service.key) as hers,
            lorry.connect(service.address, api_key=bobs_key) as bob,
            open_connection(service.address, bobs_key) as his,
        ):
            source = await alice.create_lora_training_client_async("m", rank=4)
            path = (await source.save_state("public")).path
            await hers.tell(PublishCheckpoint(hers.next_request(), path, True))
            training = await bob.create_lora_training_client_async("m", rank=4)
            await training.load_state(path)
            copy = await copied(his, path)
            assert await lines(bob.create_rest_client()) == [
                (training.model_id, path, False, "load", True),
                (copy.removeprefix("tinker://").partition("/")[0], path, True, "copy", True),
            ]
            assert await lines(alice.create_rest_client()) == []
