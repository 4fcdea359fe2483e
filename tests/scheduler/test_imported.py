"""An adapter that an operator puts into the data: recorded once, as what it is; and the runs that begin with it."""

import secrets
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

import lorry
from lorry.client.operator import import_adapter
from lorry.client.training import TrainingClient
from lorry.scheduler import broker
from lorry.scheduler.config import BrokerConfig
from lorry.storage.checkpoints import imported_folder
from lorry.storage.rows import RunRow
from lorry.storage.store import Store
from lorry.wire.client_messages import ImportAdapter
from lorry.wire.errors import InvalidRequestError, LorryError, NotFoundError, UnknownModelError
from lorry.wire.ids import RunId, TenantId
from lorry.wire.types import AdamParams, LoraConfig

from .scripted import scripted_actor

LORA = LoraConfig(rank=4, seed=0, train_mlp=False, train_unembed=False, alpha=16.0, target_modules=["q_proj"])


def config(data: Path) -> BrokerConfig:
    return BrokerConfig(data, ("m",), "token", bind="tcp://127.0.0.1:*", heartbeat_s=60, operator_key="key")


def order(data: Path, run: str | None = None, **changes: object) -> ImportAdapter:
    """Its folder is there."""
    told = ImportAdapter(
        request=1,
        operator_key="key",
        run=RunId(run or "run-" + secrets.token_hex(8)),
        tenant=TenantId("alice"),
        base_model="m",
        lora=LORA,
        name="theirs",
        size_bytes=10,
        checksum="ab",
    )
    told = msgspec.structs.replace(told, **changes)
    if run is None:
        imported_folder(data / "checkpoints", told.run).mkdir(parents=True)
    return told


def key_of(data: Path, tenant: str) -> str:
    with closing(Store(data)) as store:
        return store.create_key(TenantId(tenant), 1.0)


def runs(data: Path) -> dict[str, RunRow]:
    with closing(Store(data)) as store:
        return {run.id: run for run in store.runs()}


async def on_attention(service: lorry.ServiceClient, **options: object) -> TrainingClient:
    return await service.create_lora_training_client_async("m", 4, train_mlp=False, train_unembed=False, **options)  # type: ignore[arg-type]


async def test_sent_twice_it_is_imported_once_and_nobody_elses(tmp_path: Path) -> None:
    async with broker.running(config(tmp_path)) as addresses, scripted_actor(addresses.actors, "token", "m"):
        alice, bob = (key_of(tmp_path, tenant) for tenant in ("alice", "bob"))
        told = order(tmp_path)
        first = await import_adapter(addresses.clients, None, told)
        assert await import_adapter(addresses.clients, None, told) == first
        assert first.training_path == f"tinker://{told.run}/weights/theirs"
        assert first.sampler_path == f"tinker://{told.run}/sampler_weights/theirs"
        async with lorry.connect(addresses.clients, api_key=alice) as service:
            await service.create_sampling_client_async(first.sampler_path)
            (came,) = await service.create_rest_client().get_lineage_async()
            assert (came.run, came.path, came.way, came.parent) == (told.run, None, "import", True)
        async with lorry.connect(addresses.clients, api_key=bob) as service:
            with pytest.raises(NotFoundError):
                await service.create_sampling_client_async(first.sampler_path)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"operator_key": "guess"}, InvalidRequestError, "operator.key in the data folder"),
        ({"tenant": "nobody"}, NotFoundError, "there is no tenant 'nobody'"),
        ({"base_model": "n"}, UnknownModelError, "served are: m"),
        ({"name": "../up"}, InvalidRequestError, "name is '../up'"),
        ({"run": "../../up"}, InvalidRequestError, "run is '../../up'"),
        ({"run": "run-0123456789abcdef"}, NotFoundError, "there is no .*run-0123456789abcdef"),
        ({"lora": LoraConfig(rank=65)}, InvalidRequestError, "rank is 65, expected a whole number from 1 to 64"),
        ({"lora": LoraConfig(rank=0)}, InvalidRequestError, "rank is 0, expected a whole number from 1 to 64"),
        ({"lora": LoraConfig(alpha=float("nan"))}, InvalidRequestError, "alpha is nan"),
    ],
)
async def test_what_is_wrong_is_told_and_nothing_is_imported(
    tmp_path: Path, changes: dict[str, object], error: type[LorryError], words: str
) -> None:
    async with broker.running(config(tmp_path)) as addresses, scripted_actor(addresses.actors, "token", "m"):
        key_of(tmp_path, "alice")
        with pytest.raises(error, match=words):
            await import_adapter(addresses.clients, None, order(tmp_path, **changes))
        assert runs(tmp_path) == {}


async def test_a_run_of_somebody_elses_is_not_taken(tmp_path: Path) -> None:
    async with broker.running(config(tmp_path)) as addresses, scripted_actor(addresses.actors, "token", "m"):
        alice = key_of(tmp_path, "alice")
        key_of(tmp_path, "bob")
        async with lorry.connect(addresses.clients, api_key=alice) as service:
            training = await on_attention(service)
            for tenant in ("alice", "bob"):
                told = order(tmp_path, training.model_id, tenant=TenantId(tenant))
                with pytest.raises(InvalidRequestError, match="a new run"):
                    await import_adapter(addresses.clients, None, told)


async def test_a_run_that_begins_with_a_load_has_its_shape_from_there_also_after_a_restart(tmp_path: Path) -> None:
    async with broker.running(config(tmp_path)) as addresses, scripted_actor(addresses.actors, "token", "m"):
        key = key_of(tmp_path, "alice")
        path = (await import_adapter(addresses.clients, None, order(tmp_path))).training_path
        async with lorry.connect(addresses.clients, api_key=key) as service:
            training = await on_attention(service)
            with pytest.raises(NotFoundError):
                await training.load_state(path.replace("theirs", "tehirs"))  # is not what it begins with
            loads = [training.load_state(path) for _ in range(2)]  # the second meets what the first made of it
            for load in loads:
                await load
            saved = (await training.save_state("further")).path
    shape = runs(tmp_path)[training.model_id].lora
    assert (shape.alpha, shape.target_modules) == (16.0, ["q_proj"])
    async with (
        broker.running(config(tmp_path)) as addresses,
        scripted_actor(addresses.actors, "token", "m"),
        lorry.connect(addresses.clients, api_key=key) as service,
    ):
        await (await on_attention(service)).load_state(saved)


async def test_a_run_that_has_begun_keeps_its_shape(tmp_path: Path) -> None:
    async with broker.running(config(tmp_path)) as addresses, scripted_actor(addresses.actors, "token", "m"):
        key = key_of(tmp_path, "alice")
        path = (await import_adapter(addresses.clients, None, order(tmp_path))).training_path
        async with lorry.connect(addresses.clients, api_key=key) as service:
            training = await on_attention(service)
            training.optim_step(AdamParams())
            with pytest.raises(InvalidRequestError, match=r"with alpha 32\.0, its own is 16\.0"):
                await training.load_state(path)
            await training.optim_step(AdamParams())
            said = await on_attention(service, expert_lora="independent")
            with pytest.raises(InvalidRequestError, match="with expert_lora independent, its own is shared"):
                await said.load_state(path)
            all_layers = await service.create_lora_training_client_async("m", 4)
            with pytest.raises(InvalidRequestError, match="with train_mlp True, its own is False"):
                await all_layers.load_state(path)
    assert all(run.lora.alpha == 32.0 for run in runs(tmp_path).values() if run.nonce != run.id)
