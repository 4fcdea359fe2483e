"""Any server of the Tinker API, by URL, through the official SDK."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import numpy as np
import tinker

from .drive import Marks, Seat
from .keys import key_of
from .requests import Batch, Prompt, Row
from .workload import Tenant

_STEP = tinker.AdamParams(learning_rate=1e-5)


class TinkerServer:
    """Each tenant comes with the key of its name, or with everybody's."""

    def __init__(self, url: str, model: str, keys: Mapping[str, str]) -> None:
        self._url, self._model, self._keys = url, model, keys

    @asynccontextmanager
    async def seat(self, tenant: Tenant, name: str) -> AsyncGenerator[Seat]:
        key = key_of(self._keys, name)
        # It asks its server, and waits, before it has a session.
        service = await anyio.to_thread.run_sync(_connected, self._url, key)
        try:
            yield await _seat_of(service, self._model, tenant, name)
        finally:
            with anyio.CancelScope(shield=True):
                await service.close("success")


def _connected(url: str, key: str) -> tinker.ServiceClient:
    service = tinker.ServiceClient(base_url=url, api_key=key)
    _ = service.holder
    return service


async def _seat_of(service: tinker.ServiceClient, model: str, tenant: Tenant, name: str) -> "_TinkerSeat":
    training, base, own = None, None, None
    if tenant.has_run:
        training = await service.create_lora_training_client(
            model,
            tenant.rank,
            train_mlp=tenant.train_mlp,
            train_attn=tenant.train_attn,
            train_unembed=tenant.train_unembed,
            user_metadata={"bench": name},
        )
    if tenant.samples_base:
        base = await service.create_sampling_client(base_model=model)
    if training is not None and tenant.samples_own:
        own = await training.save_weights_and_get_sampling_client()
    return _TinkerSeat(training, base, own)


class _TinkerSeat:
    def __init__(
        self,
        training: tinker.TrainingClient | None,
        base: tinker.SamplingClient | None,
        own: tinker.SamplingClient | None,
    ) -> None:
        self._training, self._base, self._own = training, base, own

    async def train(self, batch: Batch, marks: Marks) -> None:
        assert self._training is not None, "a tenant who trains has a run"
        data = [_datum(row) for row in batch.rows]
        passed = self._training.forward_backward(data, cast(Any, batch.loss_fn))
        stepped = self._training.optim_step(_STEP) if batch.step else None
        await passed
        if stepped is not None:
            await stepped

    async def sample(self, prompt: Prompt, marks: Marks) -> int:
        sampler = self._base if prompt.base else self._own
        assert sampler is not None, "there is one of each kind that the tenant's work asks for"
        params = tinker.SamplingParams(max_tokens=prompt.max_tokens, seed=prompt.seed, stop=[])
        found = await sampler.sample(tinker.ModelInput.from_ints(prompt.tokens), prompt.samples, params)
        return sum(len(sequence.tokens) for sequence in found.sequences)


def _datum(row: Row) -> tinker.Datum:
    inputs = {"target_tokens": tinker.TensorData.from_numpy(np.asarray(row.targets, dtype=np.int64))}
    for name, values in (("logprobs", row.logprobs), ("advantages", row.advantages)):
        if values is not None:
            inputs[name] = tinker.TensorData.from_numpy(np.asarray(values, dtype=np.float32))
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(row.tokens), loss_fn_inputs=inputs)
