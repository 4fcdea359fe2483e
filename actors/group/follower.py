"""A rank that is not the first: a process that does what the first one tells it, at the same time.

It decides nothing and looks at no clock. Where a pass pauses, it waits until the first goes on, and executes what that
tells it meanwhile. It ends when the first one has.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import poll
from typing import Any, BinaryIO

import msgspec
import torch
from transformers import CONFIG_MAPPING

from ..images.layout import Seen
from ..model.base_model import BaseModel, outline
from ..model.in_flight import Segment
from ..model.leading import SeenHead, Stretch, unpacked, unseen
from ..model.lora import attach_lora, logits_of_some
from ..model.memory import memory_ran_out
from ..model.ranks import Ranks, RanksPartedError
from ..model.survey import survey
from ..sampling.decode_linears import DecodeLinears
from ..sampling.kv_cache import KVCache, PromptChunk, Reading
from ..sampling.led_pass import BeginSampling, Clear, Copy, Decode, Head, Whose
from ..sampling.model_pass import Adapters, ModelPass, Step
from ..training.logprobs import Targets
from ..training.training_pass import BeginTraining, Heard, PassInput, Train, TrainingPass
from .adapters import finite_everywhere, put_together, received, step_together
from .connecting import ranks_of
from .dividing import COMPARED_TOKENS, take_share
from .messages import (
    AdamStep,
    AllFinite,
    Build,
    Change,
    Compare,
    Drop,
    Fetch,
    GoOn,
    Joined,
    Order,
    Regroup,
    Report,
    Send,
    read_to_rank,
    write,
)
from .parts import RankAdapter


@dataclass(slots=True)
class _Sampling:
    """One decoder's, with the rows of its last step."""

    cache: KVCache
    linears: DecodeLinears
    model_pass: ModelPass
    readings: list[Reading] = field(default_factory=list[Reading])


class ModelPart:
    """What this rank has of one base model, and what it does with it. Everything runs together with the others."""

    def __init__(self, ranks: Ranks, build: Build) -> None:
        raw: dict[str, Any] = msgspec.json.decode(build.config)
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        base = outline(config, getattr(torch, build.dtype))
        targets = attach_lora(base, build.layout)
        self.base, self.targets = take_share(base, targets, ranks, None, build.tensors)
        self._ranks = ranks
        self._training: TrainingPass | None = None
        self._decoders: dict[int, _Sampling] = {}
        self._adapters: dict[int, RankAdapter] = {}

    def execute(self, command: msgspec.Struct) -> None:
        match command:
            case Compare():
                logits_of_some(self.base, COMPARED_TOKENS)
            case Send():
                targets = [self.targets.modules[index] for index in command.targets]
                self._adapters[command.adapter] = received(command, targets, self._ranks, self.targets.dtype, None)
            case Fetch(adapter, vectors):
                for vector in vectors:
                    put_together(self._adapters[adapter], vector)
            case Change(adapter, how):
                getattr(self._adapters[adapter], how)()
            case Drop(adapters):
                for number in adapters:
                    self._adapters.pop(number, None)
                for own in self._decoders.values():
                    own.linears.retain(set(self._adapters.values()))
            case AllFinite(adapters):
                finite_everywhere([self._adapters[number] for number in adapters], self._ranks)
            case AdamStep(adapters, params):
                step_together([self._adapters[number] for number in adapters], params, self._ranks)
            case BeginTraining(logits_bytes):
                self._training = TrainingPass(self.base, self.targets, logits_bytes)
            case Train():
                self._train(command)
            case BeginSampling():
                self._begin_sampling(command)
            case Clear(decoder, blocks):
                self._decoders[decoder].model_pass.clear(blocks)
            case Copy(decoder, pairs):
                self._decoders[decoder].model_pass.copy(pairs)
            case Decode():
                self._decode(self._decoders[command.decoder], command)
            case Head():
                self._head(self._decoders[command.decoder], command)
            case _:
                raise AssertionError(f"{type(command).__name__} is not a model's")

    def _train(self, command: Train) -> None:
        assert self._training is not None and self.base.division is not None
        segments = self._segments(command.segments)
        if command.backward:
            for stretch in command.segments:
                self._adapters[stretch.adapter].pending = True
        device = self.base.device
        row = PassInput(
            unpacked(command.tokens, device),
            unpacked(command.positions, device),
            command.lengths,
            segments,
            Targets(
                unpacked(command.targets, device),
                unpacked(command.target_rows, device),
                command.target_starts.to_numpy().tolist(),
            ),
            self._unseen(command.seen),
            command.backward,
            command.again,
        )
        self.base.in_flight.beside_others = command.beside_others
        self._training.run_here(row, Heard(command.need_logprobs, self.base.division, command.backward))

    def _begin_sampling(self, command: BeginSampling) -> None:
        shape = survey(self.base)
        cache = KVCache(shape, command.blocks, command.block_tokens, self.base.device)
        linears = DecodeLinears(self.base, shape.groups, native=False)
        self._decoders[command.decoder] = _Sampling(cache, linears, ModelPass(self.base, None, linears, cache))

    def _decode(self, own: _Sampling, command: Decode) -> None:
        device = self.base.device
        whose, places = self._whose(command.whose), unpacked(command.places, device)
        if command.tables is not None:
            own.readings = own.cache.plan_readings(command.tables)
        if command.new_rows:
            self._arrange(own, whose.of_rows)
        step = Step(
            unpacked(command.tokens, device),
            unpacked(command.positions, device),
            own.readings if len(places) else [],
            places,
            unpacked(command.slots, device),
            [PromptChunk(*prompt) for prompt in command.prompts],
            whose,
            self._unseen(command.seen),
        )
        with torch.inference_mode():
            own.model_pass.run(step, None)

    def _arrange(self, own: _Sampling, of_rows: Sequence[Segment]) -> None:
        adapters = [segment.adapter for segment in of_rows]
        own.linears.retain(set(adapters))
        own.linears.arrange(adapters, [segment.end - segment.start for segment in of_rows], self.base.device)

    def _head(self, own: _Sampling, command: Head) -> None:
        config: Any = self.base.model.config.get_text_config()
        hidden = torch.empty(command.rows, config.hidden_size, dtype=self.base.dtype, device=self.base.device)
        with torch.inference_mode():
            own.model_pass.head(self._ranks.from_first(hidden), self._whose(command.whose))

    def _whose(self, whose: Whose) -> Adapters:
        return Adapters(self._segments(whose.of_rows), self._segments(whose.of_chunks), whose.gathered)

    def _segments(self, stretches: Sequence[Stretch]) -> list[Segment]:
        return [Segment(self._adapters[s.adapter], s.start, s.end) for s in stretches]

    def _unseen(self, seen: SeenHead | None) -> Seen | None:
        if seen is None:
            return None
        config: Any = self.base.model.config.get_text_config()
        return unseen(seen, config.hidden_size, self.base.device, self.base.dtype)


class Follower:
    def __init__(self, ranks: Ranks, orders: BinaryIO, reports: BinaryIO) -> None:
        self._ranks, self._orders, self._reports = ranks, orders, reports
        self._parts: dict[int, ModelPart] = {}
        self._regroup: Regroup | None = None
        self._under_way: list[int] = []

    def serve(self) -> None:
        """Raises EOFError once the first rank has ended."""
        with self._ranks.together():
            self._ranks.join(0)
        while True:
            match read_to_rank(self._orders):
                case Order() as order:
                    self._execute(order)
                case Regroup() as regroup:
                    self._join(regroup)
                case GoOn():
                    raise AssertionError("nothing has paused")

    def _execute(self, order: Order) -> None:
        """Where it fails, whoever waits for this rank sees that it has left; and all come together again."""
        report = Report(order.number)
        self._under_way.append(order.number)
        try:
            with self._ranks.together():
                self._do(order)
        except Exception as error:
            if not self._ranks.can_part:
                traceback.print_exc()
                os._exit(1)
            self._ranks.leave()
            is_memory, is_parted = memory_ran_out(error), isinstance(error, RanksPartedError)
            trace = None if is_memory or is_parted else traceback.format_exc()
            report = Report(order.number, f"{type(error).__name__}: {error}", trace, is_memory, is_parted)
        self._under_way.pop()
        write(self._reports, report)
        if report.failed is not None:  # here, where nothing holds what the failed one did of memory any more
            self._rejoin()

    def _do(self, order: Order) -> None:
        match order.command:
            case Build() as build:
                part = self._parts[order.model] = ModelPart(self._ranks, build)
                part.base.in_flight.on_pause = lambda: self._wait(part.base)
            case command:
                self._parts[order.model].execute(command)

    def _wait(self, base: BaseModel) -> None:
        """Until the pass that has paused goes on; what comes meanwhile is executed."""
        in_flight = base.in_flight
        with in_flight.set_aside():
            while True:
                match read_to_rank(self._orders):
                    case Order() as order:
                        self._execute(order)
                    case GoOn(beside_others):
                        in_flight.beside_others = beside_others
                        return
                    case Regroup() as regroup if regroup.number == self._under_way[-1]:
                        self._regroup = regroup
                        raise RanksPartedError("the first rank broke off")
                    case Regroup() as regroup:  # an order that was over here already
                        self._join(regroup)

    def _rejoin(self) -> None:
        """What the first rank said before it knew is not for this one any more."""
        regroup, self._regroup = self._regroup, None
        while regroup is None:
            message = read_to_rank(self._orders)
            regroup = message if isinstance(message, Regroup) else None
        self._join(regroup)

    def _join(self, regroup: Regroup) -> None:
        with self._ranks.together():
            self._ranks.join(regroup.generation)
        write(self._reports, Joined(regroup.generation))


def end_with(orders: int) -> None:
    """Ends the process as soon as nobody can write to that pipe any more, whatever else it waits for."""
    waiting = poll()
    waiting.register(orders, 0)
    waiting.poll()
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    """As the first rank starts it."""
    rank, size, device, threads, meeting, orders, reports = arguments
    # The first rank decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with, args=[int(orders)], daemon=True).start()
    torch.set_num_threads(int(threads))
    ranks = ranks_of(Path(meeting), int(rank), int(size), device)
    with (
        os.fdopen(int(orders), "rb") as orders_pipe,
        os.fdopen(int(reports), "wb") as reports_pipe,
        suppress(EOFError),
    ):
        Follower(ranks, orders_pipe, reports_pipe).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
