"""Requests on their way into the decode loop: payloads are checked, images are seen, and adapters find their slots."""

import time
from collections import deque
from collections.abc import Callable
from zlib import crc32

import msgspec
import structlog
import torch

from ..wire.codec import MAX_PAYLOAD_BYTES, decode
from ..wire.commands import ComputeLogprobsInput, SampleInput, check_sample, check_tokens
from ..wire.errors import InternalError, LorryError, OutOfMemoryError
from ..wire.ids import BatchId, FutureId
from ..wire.streaming import Resumed, Told, made_before
from .adapters.residents import Residents
from .images.layout import count_images
from .images.looking import Looking, Read
from .model.base_model import BaseModel
from .model.memory import memory_ran_out, told_as_ours
from .orders import Sample
from .sampling.decoder import Decoder
from .sampling.sequences import Usage

log = structlog.get_logger("lorry.actor")

_RESUMED_BYTES = 2 * MAX_PAYLOAD_BYTES
"""A request, and what was made of it."""


class Arrival:
    """`request` and `prompt` are there once `read` has said so, and so is what another actor `made` of it."""

    def __init__(self, sample: Sample, base: BaseModel) -> None:
        self.sample = sample
        self.request: SampleInput | ComputeLogprobsInput | None = None
        self.made: list[Told] = []
        self.prompt: Read | None = None
        self._base = base
        self._looking: Looking | None = None

    @property
    def future(self) -> FutureId:
        return self.sample.item.future

    def read(self, *, look: bool) -> bool:
        """Whether all has been read. Never waits, and has one image at most go through the tower: none, unless it may
        `look`.

        Raises LorryError for what is wrong with the request, once for all but for OutOfMemoryError.
        """
        if self.request is None:
            self._check()
        assert self.request is not None and self._looking is not None, "checked"
        if self.request.prompt.has_images and not look:
            return False
        with told_as_ours("what is seen in the prompt's images", "prompt"):
            self.prompt = self._looking.go_on()
        return self.prompt is not None

    @property
    def lacks_pixels(self) -> bool:
        return self._looking is not None and self._looking.awaited is not None

    def close(self) -> None:
        if self._looking is not None:
            self._looking.close()

    def _check(self) -> None:
        base, payload, made = self._base, self.sample.payload, list[bytes]()
        if self.sample.item.resumed:
            resumed = decode(payload, Resumed, _RESUMED_BYTES)
            payload, made = resumed.request, resumed.made
        request = decode(payload, SampleInput if self.sample.item.kind == "sample" else ComputeLogprobsInput)
        counted = count_images("prompt", request.prompt, base.eyes, base.max_context)
        request = msgspec.structs.replace(request, prompt=counted.tokens)
        if isinstance(request, SampleInput):
            check_sample(request, base.vocab_size, base.max_context)
            self.made = made_before(made, request.num_samples).told
        else:
            check_tokens("prompt", request.prompt, base.vocab_size, base.max_context)
        self.request, self._looking = request, Looking(counted, base.eyes, on_host=False)


class Arrivals:
    """`decoding` are those that have joined, each with its adapter's key or "". `is_short` says that an image did not
    find the memory that others hold for a while.

    `refuse` is told of those that cannot be read; `got_on` is called after each image.
    """

    def __init__(
        self,
        base: BaseModel,
        decoder: Decoder,
        residents: Residents,
        refuse: Callable[[Sample, LorryError], None],
        got_on: Callable[[], None],
    ) -> None:
        self.decoding: dict[FutureId, str] = {}
        self.is_short = False
        self._base, self._decoder, self._residents = base, decoder, residents
        self._refuse, self._got_on = refuse, got_on
        self._waiting: deque[Arrival] = deque()
        self._batches: dict[FutureId, BatchId] = {}

    def __bool__(self) -> bool:
        """Whether some wait."""
        return bool(self._waiting)

    @property
    def await_pixels(self) -> bool:
        """Whether nothing can be done for any that waits until pixels come: their order does, if this is so."""
        lacking = [arrival.lacks_pixels for arrival in self._waiting]
        return any(lacking) and all(arrival.request is not None for arrival in self._waiting)

    @property
    def adapters(self) -> set[str]:
        """That are sampled from."""
        return {key for key in self.decoding.values() if key}

    def add(self, sample: Sample) -> None:
        self._waiting.append(Arrival(sample, self._base))

    def cancel(self, future: FutureId) -> tuple[BatchId, Usage | None] | None:
        """Of one that waits or decodes, its batch, and what was computed for it; it is forgotten."""
        waiting = next((arrival for arrival in self._waiting if arrival.future == future), None)
        if waiting is not None:
            waiting.close()
            self._waiting.remove(waiting)
            return waiting.sample.batch, None
        if future not in self.decoding:
            return None
        usage = self._decoder.cancel(future)
        return self.leave(future), usage

    def leave(self, future: FutureId) -> BatchId:
        """It decodes no more."""
        if key := self.decoding.pop(future):
            self._residents.release([key])
        return self._batches.pop(future)

    def admit(self, *, look: bool, one: bool, others_hold_memory: bool = False) -> float:
        """Requests join the decode loop, as long as their adapters fit the slots together. Those with images are read
        one after the other, beside the rest, and only if they may `look`: `one` image, or as many as have pixels.

        Returns how many seconds images took.
        """
        looked_s, may_look = 0.0, look
        for arrival in list(self._waiting):
            state = arrival.sample.item.adapter
            if len(self.adapters | ({state.key} if state else set())) > self._residents.pool.slots:
                break
            started = time.perf_counter()
            try:
                done = self._read(arrival, look=may_look and self._has_room, one=one)
                if done:
                    self._join(arrival)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                if isinstance(error, OutOfMemoryError) and others_hold_memory:
                    self.is_short = True
                    break
                arrival.close()
                self._refuse(arrival.sample, _told(arrival, error))
                done = True
            if arrival.request is None or arrival.request.prompt.has_images:
                looked_s += time.perf_counter() - started
                may_look = may_look and done and not one
            if done:
                self._waiting.remove(arrival)
        return looked_s

    @property
    def _has_room(self) -> bool:
        """What was seen is held until its prompt is computed: that is not to pile up."""
        eyes = self._base.eyes
        return eyes is not None and self._decoder.sights_bytes <= eyes.cache_bytes

    def _read(self, arrival: Arrival, *, look: bool, one: bool) -> bool:
        while not arrival.read(look=look):
            self._got_on()
            if one or not look or arrival.lacks_pixels:
                return False
        return True

    def _join(self, arrival: Arrival) -> None:
        item = arrival.sample.item
        key = "" if item.adapter is None else self._residents.hold_sampler(item.adapter)
        try:
            self._start(arrival, key)
        except LorryError:
            self._residents.release([key] if key else [])
            raise
        self._batches[item.future], self.decoding[item.future] = arrival.sample.batch, key

    def _start(self, arrival: Arrival, key: str) -> None:
        item, request, prompt = arrival.sample.item, arrival.request, arrival.prompt
        assert request is not None and prompt is not None, "read"
        adapter = self._residents.get(key) if key else None
        seed = crc32(item.future.encode())  # the same when the command is executed again elsewhere
        # Sampler weights are fixed, and their folder, the key, is never used twice. It is a path, which no scope is.
        owner = key or (f"scope {item.scope}" if item.scope else None)
        if isinstance(request, SampleInput):
            self._decoder.add(
                item.future, request, adapter, seed, owner, prompt, streams=item.stream, made=arrival.made
            )
        else:
            self._decoder.add_prompt(item.future, prompt, adapter, owner)


def _told(arrival: Arrival, error: Exception) -> LorryError:
    if isinstance(error, LorryError):
        return error
    log.exception("internal error", request=arrival.future)
    problem = f"reading the request raised {type(error).__name__}: {error}"
    return OutOfMemoryError(problem, field="prompt") if memory_ran_out(error) else InternalError(problem)
