"""Lorry by its own client: one that runs already, or one that is started for the run."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar, cast

import anyio
import numpy as np

from lorry.actors.config import ActorSettings
from lorry.client import SamplingClient, ServiceClient, TrainingClient, connect
from lorry.client.futures import Future
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import Deployment, serving
from lorry.storage.looking import looking
from lorry.storage.reports import actors
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, Datum, LossFnType, SamplingParams, TensorData

from .device import Reading
from .drive import Marks, Seat
from .keys import key_of
from .requests import Batch, Prompt, Row
from .workload import Tenant

T = TypeVar("T")

_STEP = AdamParams(learning_rate=1e-5)


class LorryServer:
    """At `address`; each tenant comes with the key of its name in `keys`, or with the one that is everybody's, ""."""

    def __init__(self, address: str, model: str, keys: Mapping[str, str], server_key: str | None = None) -> None:
        self._address, self._model, self._keys, self._server_key = address, model, keys, server_key

    @asynccontextmanager
    async def seat(self, tenant: Tenant, name: str) -> AsyncGenerator[Seat]:
        key = key_of(self._keys, name)
        async with connect(self._address, api_key=key, server_key=self._server_key) as service:
            yield await _seat_of(service, self._model, tenant, name)


class EmbeddedServer:
    """Each tenant gets a key of its own."""

    def __init__(self, deployment: Deployment, model: str, data: Path) -> None:
        self._deployment, self.model, self._data = deployment, model, data

    async def reading(self, at_s: float) -> Reading:
        return await anyio.to_thread.run_sync(_read, self._data, at_s)

    @asynccontextmanager
    async def seat(self, tenant: Tenant, name: str) -> AsyncGenerator[Seat]:
        keys = {name: await self._deployment.create_key(name)}
        async with LorryServer(self._deployment.address, self.model, keys).seat(tenant, name) as seat:
            yield seat


@asynccontextmanager
async def embedded(model: str, settings: ActorSettings) -> AsyncGenerator[EmbeddedServer]:
    """`model` is NAME=PATH, a folder or a hub id."""
    config = ModelConfig.parse(model)
    with TemporaryDirectory(prefix="lorry-bench-", ignore_cleanup_errors=True) as data:
        serve = ServeConfig(
            (config,), Path(data), bind="tcp://127.0.0.1:*", actor=settings, log_level="warning", grace_s=0
        )
        async with serving(serve) as deployment:
            yield EmbeddedServer(deployment, config.name, serve.data)


def _read(data: Path, at_s: float) -> Reading:
    with looking(data) as store:
        ready = [row for row in actors(store) if row["state"] == "ready"]
    train_s, sample_s = (sum(row[kind] or 0.0 for row in ready) for kind in ("train_s", "sample_s"))
    return Reading(at_s, train_s, sample_s, len(ready))


async def _seat_of(service: ServiceClient, model: str, tenant: Tenant, name: str) -> "_LorrySeat":
    training = None
    if tenant.has_run:
        training = await service.create_lora_training_client_async(
            model,
            tenant.rank,
            train_mlp=tenant.train_mlp,
            train_attn=tenant.train_attn,
            train_unembed=tenant.train_unembed,
            user_metadata={"bench": name},
        )
    base = await service.create_sampling_client_async(base_model=model) if tenant.samples_base else None
    own = None
    if training is not None and tenant.samples_own:
        own = await training.save_weights_and_get_sampling_client_async()
    return _LorrySeat(training, base, own)


class _LorrySeat:
    def __init__(
        self, training: TrainingClient | None, base: SamplingClient | None, own: SamplingClient | None
    ) -> None:
        self._training, self._base, self._own = training, base, own

    async def train(self, batch: Batch, marks: Marks) -> None:
        assert self._training is not None, "a tenant who trains has a run"
        data = [_datum(row) for row in batch.rows]
        if not batch.step:
            passed = await self._training.forward_backward_async(data, cast(LossFnType, batch.loss_fn))
            marks.acknowledged()
            await _result(passed)
            return
        passed = self._training.forward_backward(data, cast(LossFnType, batch.loss_fn))
        stepped = await self._training.optim_step_async(_STEP)
        marks.acknowledged()
        await _result(passed)
        await _result(stepped)

    async def sample(self, prompt: Prompt, marks: Marks) -> int:
        sampler = self._base if prompt.base else self._own
        assert sampler is not None, "there is one of each kind that the tenant's work asks for"
        params = SamplingParams(max_tokens=prompt.max_tokens, seed=prompt.seed, stop=[])
        found = await _result(sampler.sample(ModelInput.from_ints(prompt.tokens), prompt.samples, params))
        return sum(len(sequence.tokens) for sequence in found.sequences)


async def _result(future: Future[T]) -> T:
    """Who no longer waits for it takes the request back, so that it is not the next run's to wait for."""
    try:
        return await future
    finally:
        if not future.done():
            with anyio.CancelScope(shield=True):
                await future.cancel()


def _datum(row: Row) -> Datum:
    inputs = {"target_tokens": TensorData.from_numpy(np.asarray(row.targets, dtype=np.int64))}
    for name, values in (("logprobs", row.logprobs), ("advantages", row.advantages)):
        if values is not None:
            inputs[name] = TensorData.from_numpy(np.asarray(values, dtype=np.float32))
    return Datum(ModelInput.from_ints(row.tokens), inputs)
