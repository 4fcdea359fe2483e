"""The actor process: one socket to the broker on the event loop, one compute thread beside it."""

import asyncio
import math
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import structlog
from anyio import to_thread

from ..wire import sockets
from ..wire.actor_messages import (
    VERSION,
    ActorHello,
    ActorLeaving,
    ActorPong,
    ActorWelcome,
    CancelCommand,
    Capacity,
    Expelled,
    FromActor,
    LeaveNow,
    LoadFailed,
    MicroBatch,
    ModelFacts,
    Retired,
    SnapshotRecorded,
    ToActor,
)
from ..wire.codec import MAX_HEADER_BYTES, decode, encode
from ..wire.errors import (
    ConnectionLostError,
    ErrorInfo,
    InvalidRequestError,
    LorryError,
    UnsupportedModelError,
)
from ..wire.sequenced import Link
from ..wire.sockets import Channel
from ..wire.tasks import background_tasks
from .config import ActorConfig, ActorSettings
from .uncollected import uncollected

if TYPE_CHECKING:
    import torch
    from anyio.streams.memory import MemoryObjectReceiveStream

    from .worker import Job, Post, Worker

log = structlog.get_logger("lorry.actor")

_MAX_BROKER_HEADER_BYTES = 64 * MAX_HEADER_BYTES
_HELLO_TIMEOUT_S = 30.0
_SHARE_OF_FREE = 0.9
"""Of what an accelerator has free, what a training pass may hold: an allocator has losses."""


async def serve(config: ActorConfig, ready: Callable[[], None], leaving: anyio.Event) -> None:
    """Load the model, join the broker, work until cancelled; or, after `leaving` is set, until what it holds has ended
    and its runs are saved.

    `ready` is called once the broker has said welcome. Raises ConnectionLostError when the broker expels the actor or
    falls silent: what the actor holds counts for nothing then, so the process is to end and a fresh one to start.
    Raises UnsupportedModelError for a model that cannot be served, once the broker has been told.
    """
    identity = f"actor-{secrets.token_hex(8)}".encode()
    server_key = config.server_key.encode() if config.server_key else None
    jobs, to_write = anyio.create_memory_object_stream["Job"](math.inf)
    with sockets.connect(config.connect, server_key, identity) as channel, jobs, to_write:
        async with background_tasks() as tasks:
            loop = asyncio.get_running_loop()
            link = Link(channel.send)

            def post(message: FromActor, payloads: Sequence[bytes] = ()) -> None:
                loop.call_soon_threadsafe(link.send, [encode(message), *payloads])

            def write(job: "Job") -> None:
                loop.call_soon_threadsafe(jobs.send_nowait, job)

            try:
                worker, facts = await to_thread.run_sync(_build, config, post, write)
            except Exception as error:  # whatever it is, who waits for the model is to know
                failed = LoadFailed(VERSION, config.token, config.actor, config.base_model, _told(config, error))
                channel.send([encode(failed)])
                raise
            actor = _Actor(config, channel, link, worker, facts, leaving)
            tasks.start_soon(_work, worker, left := anyio.Event())
            tasks.start_soon(_write, to_write, worker)
            try:
                await actor.join(ready)
                tasks.start_soon(actor.heartbeat)
                tasks.start_soon(actor.receive)
                tasks.start_soon(actor.leave_when_told)
                await left.wait()
            finally:
                actor.stop_worker()


async def _work(worker: "Worker", left: anyio.Event) -> None:
    await to_thread.run_sync(worker.run, abandon_on_cancel=True)
    left.set()


async def _write(to_write: "MemoryObjectReceiveStream[Job]", worker: "Worker") -> None:
    """One after the other, beside the compute thread, which is told how each went."""
    async for job in to_write:
        worker.orders.put(await to_thread.run_sync(job, abandon_on_cancel=True))


def _build(config: ActorConfig, post: "Post", write: "Callable[[Job], None]") -> "tuple[Worker, ModelFacts]":
    """Everything that takes seconds: torch, transformers, the weights."""
    with uncollected():
        import torch
        from transformers.utils import logging

        from .adapters.behind import SnapshotPolicy
        from .adapters.residents import Residents
        from .adapters.slots import AdapterPool
        from .group.connecting import device_of
        from .group.leader import Group
        from .group.models import divide
        from .model.base_model import load_base_model
        from .model.lora import attach_lora, quantise_experts
        from .model.memory import free_on
        from .outbox import Outbox, Written
        from .progress import Progress
        from .sampling.compiled import CompiledModel
        from .sampling.decoder import Decoder
        from .sampling.lora.kernel import has_kernel
        from .training.compiled_layers import CompiledLayers
        from .training.engine import Engine
        from .training.trainer import Trainer
        from .worker import Worker

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    settings = config.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    for rank in range(settings.tensor_parallel):
        _check_device(str(device_of(settings.device, rank)) if rank else settings.device)
    trusted, group = settings.trust_remote_code, None
    if (ranks := settings.tensor_parallel) > 1:
        _check_division(settings)
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
        group = Group(ranks, settings.device, torch.get_num_threads())
    base = load_base_model(
        config.model,
        "cpu" if group else settings.device,
        settings.dtype,
        trust_remote_code=trusted,
        quantize=settings.quantize,
        max_pixels=settings.image_pixels,
        image_cache_bytes=settings.image_cache_bytes,
    )
    tokenizer = _load_tokenizer(config.model, trusted)
    targets = attach_lora(base, settings.adapter_layout)
    if group is not None:
        base, targets = divide(group, base, targets)
    if settings.quantize == "nf4":
        quantise_experts(base)
    pool = AdapterPool(settings.slots, base.device, lends=group is not None)

    def available() -> int:
        if settings.pass_bytes:
            return settings.pass_bytes
        if base.device.type != "cuda":
            return _host_bytes() // 4
        return int((free_on(base.device) - decoder.bytes_to_come) * _SHARE_OF_FREE)

    engine = Engine(base, targets, pool, token_budget=settings.token_budget, available=available)
    memory = settings.kv_cache_bytes or _kv_cache_bytes(base.device)
    compiled = CompiledModel(base) if settings.compile else None
    if settings.compile:
        base.in_flight.layers = CompiledLayers(base, targets)
    decoder = Decoder(
        base, tokenizer, settings.sample_rows, settings.prefill_chunk, memory, compiled, native=has_kernel(base)
    )
    host_bytes = settings.host_memory or _host_bytes() // 4
    policy = SnapshotPolicy(settings.recovery_s, settings.idle_save_s)
    outbox = Outbox()

    def tell(message: Written) -> None:
        if not outbox.keeps(message.run, message):
            post(message)

    residents = Residents(targets, pool, host_bytes, policy, tell)
    trainer = Trainer(engine, residents, targets, config.base_model)
    progress, saving = Progress(settings.hang_s), Progress(settings.hang_s)
    share = settings.sample_share
    worker = Worker(engine, decoder, residents, trainer, share, post, write, progress, saving, outbox)
    facts = ModelFacts(
        vocab_size=base.vocab_size,
        max_context=base.max_context,
        tokenizer_id=os.path.abspath(config.model) if os.path.isdir(config.model) else config.model,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        trainable=sorted({target.group for target in targets.modules}),
        frozen_experts=targets.frozen_experts,
        end_tokens=list(base.end_tokens),
    )
    return worker, facts


def _check_division(settings: ActorSettings) -> None:
    """What a group cannot do yet. Raises InvalidRequestError."""
    for field, value in (("compile", settings.compile), ("trust_remote_code", settings.trust_remote_code)):
        if value:
            raise InvalidRequestError.of(field, value, "nothing of the kind with --tensor-parallel")
    if settings.quantize != "none":
        raise InvalidRequestError.of("quantize", settings.quantize, "none with --tensor-parallel")
    if settings.device.partition(":")[0] not in ("cpu", "cuda"):
        raise InvalidRequestError.of("device", settings.device, "cpu or cuda with --tensor-parallel")


def _told(config: ActorConfig, error: Exception) -> ErrorInfo:
    if isinstance(error, LorryError):
        return error.info
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UnsupportedModelError(f"{config.model!r} cannot be loaded: {type(error).__name__}: {reason}").info


def _load_tokenizer(model: str, trust_remote_code: bool) -> Any:
    """Raises UnsupportedModelError where there is none, or none that is data alone and code is not trusted."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"cannot load a tokenizer from {model!r}: {reason}") from error


def _kv_cache_bytes(device: "torch.device") -> int:
    """On the host what is never used is never touched; on an accelerator training needs most of what is free."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free * 2 // 5
    return _host_bytes() // 10


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError.of("device", device, f"a device that torch has here: {error}") from error


class _Actor:
    def __init__(
        self,
        config: ActorConfig,
        channel: Channel,
        link: Link,
        worker: "Worker",
        facts: ModelFacts,
        leaving: anyio.Event,
    ) -> None:
        self._config, self._channel, self._worker, self._facts = config, channel, worker, facts
        self._link, self._leaving = link, leaving
        self._heartbeat_s = 5.0
        self._heard = 0.0

    async def join(self, ready: Callable[[], None]) -> None:
        """Say hello until somebody answers. Raises ConnectionLostError where nobody does."""
        self._channel.on_reconnect = self._greet
        with anyio.move_on_after(_HELLO_TIMEOUT_S) as waiting:
            while self._link.name is None:
                self._hello()
                with anyio.move_on_after(self._heartbeat_s):
                    await self._receive()
        if waiting.cancelled_caught:
            raise ConnectionLostError(f"no broker answers at {self._config.connect}")
        ready()

    def _hello(self) -> None:
        import torch

        from .model.memory import device_id

        config, settings = self._config, self._config.settings
        capacity = Capacity(
            slots=settings.slots,
            token_budget=settings.token_budget,
            sample_rows=settings.sample_rows,
            max_rank=config.max_rank,
            sample_share=settings.sample_share,
        )
        hello = ActorHello(
            VERSION,
            config.token,
            config.actor,
            config.base_model,
            capacity,
            self._facts,
            os.getpid(),
            device_id(torch.device(self._facts.device)),
        )
        self._channel.send([encode(hello)])

    async def receive(self) -> None:
        while True:
            await self._receive()

    async def _receive(self) -> None:
        for frames in await self._channel.receive():
            self._heard = anyio.current_time()
            for message in self._link.arrived(frames):
                self._handle(message)

    def _handle(self, frames: list[bytes]) -> None:
        from .orders import Leave, Sample, Train

        message: ToActor = decode(frames[0], ToActor, _MAX_BROKER_HEADER_BYTES)
        if isinstance(message, MicroBatch):
            self._link.confirm()  # before it begins: should it end this process, the broker knows that it was here
        match message:
            case MicroBatch(mode="train"):
                self._worker.orders.put(Train(message, frames[1:]))
            case MicroBatch():
                for item, payload in zip(message.items, frames[1:], strict=True):
                    self._worker.orders.put(Sample(message.batch, item, payload))
            case CancelCommand() | SnapshotRecorded():
                self._worker.orders.put(message)
            case LeaveNow():
                self._leaving.set()
            case Retired():
                self._worker.orders.put(Leave())
            case ActorWelcome(session, heartbeat_s):
                if self._link.name is None:
                    self._heartbeat_s = heartbeat_s
                    self._link.open(session)
            case Expelled(reason):
                raise ConnectionLostError(f"the broker expelled this actor: {reason}")
            case ActorPong():
                pass

    async def leave_when_told(self) -> None:
        await self._leaving.wait()
        self._link.send([encode(ActorLeaving())])

    async def heartbeat(self) -> None:
        while True:
            worker = self._worker
            self._greet()
            await anyio.sleep(self._heartbeat_s)
            for what, progress in (("compute thread", worker.progress), ("disk, or who writes to it,", worker.saving)):
                if (hangs_s := progress.hangs_s()) is not None:
                    log.error(f"the {what} hangs; another process takes over", without_progress_s=round(hangs_s, 1))
                    os._exit(1)  # a thread that hangs is waited for by every gentler way
            silent_s = anyio.current_time() - self._heard
            if silent_s > 3 * self._heartbeat_s:
                raise ConnectionLostError("the broker was silent for three heartbeats")
            if silent_s > 1.5 * self._heartbeat_s:  # perhaps the connection is dead, and nobody has told either end
                self._channel.reconnect()

    def _greet(self) -> None:
        """Whatever was lost before shows in the answer."""
        if self._link.name is None:
            self._hello()
            return
        self._link.beat([encode(self._worker.measured)])

    def stop_worker(self) -> None:
        from .orders import Stop

        self._worker.orders.put(Stop())
