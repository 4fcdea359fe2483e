"""What the first rank and the others tell each other. Tensors go another way, see `model.ranks`."""

from typing import BinaryIO, Literal, TypeAlias

import msgspec

from ...wire.codec import decode, encode
from ...wire.types import AdamParams, ExpertLora, FileLayout
from ..sampling.led_pass import BeginSampling, Clear, Copy, Decode, Head
from ..training.training_pass import BeginTraining, Train

_LENGTH_BYTES = 4
_LIMIT = 2 ** (8 * _LENGTH_BYTES) - 1


class TensorFacts(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a model, under every name that it has there."""

    names: list[str]
    shape: list[int]
    dtype: str


class Build(msgspec.Struct, frozen=True, tag=True):
    """A base model of transformers' configuration, in JSON. Its tensors follow, in order."""

    config: str
    dtype: str
    layout: FileLayout
    tensors: list[TensorFacts]


class Compare(msgspec.Struct, frozen=True, tag=True):
    """The logits of some tokens without adapters are wanted."""


class Send(msgspec.Struct, frozen=True, tag=True):
    """An adapter, on the targets of these places in model order. Its weights follow; its moments, if it has some; and
    its gradient, if it is pending."""

    adapter: int
    rank: int
    alpha: float
    expert_lora: ExpertLora
    targets: list[int]
    trainable: bool
    step: int
    pending: bool


Vector: TypeAlias = Literal["weights", "exp_avg", "exp_avg_sq", "grad", "marked"]


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """These vectors of an adapter are wanted whole."""

    adapter: int
    vectors: list[Vector]


How: TypeAlias = Literal["mark", "rollback", "commit", "discard"]


class Change(msgspec.Struct, frozen=True, tag=True):
    """What is to be done with the adapter's gradient: see `Adapter`."""

    adapter: int
    how: How


class Drop(msgspec.Struct, frozen=True, tag=True):
    adapters: list[int]


class AllFinite(msgspec.Struct, frozen=True, tag=True):
    """Whether their gradients are, is wanted."""

    adapters: list[int]


class AdamStep(msgspec.Struct, frozen=True, tag=True):
    adapters: list[int]
    params: list[AdamParams]


Command: TypeAlias = (
    Build
    | Compare
    | Send
    | Fetch
    | Change
    | Drop
    | AllFinite
    | AdamStep
    | BeginTraining
    | Train
    | BeginSampling
    | Clear
    | Copy
    | Decode
    | Head
)


class Order(msgspec.Struct, frozen=True, tag=True):
    """Commands are numbered from the first on, and the models they are for, too."""

    number: int
    model: int
    command: Command


class GoOn(msgspec.Struct, frozen=True, tag=True):
    """A pass that paused is to go on, beside others or not."""

    beside_others: bool


class Regroup(msgspec.Struct, frozen=True, tag=True):
    """The order of that number is to be broken off, and the ranks to join for the n-th time."""

    generation: int
    number: int


ToRank: TypeAlias = Order | GoOn | Regroup


class Report(msgspec.Struct, frozen=True, tag=True):
    """An order was executed, or not: `is_parted`, since another rank had left; `is_memory`, for want of it. `trace` is
    there for anything else."""

    number: int
    failed: str | None = None
    trace: str | None = None
    is_memory: bool = False
    is_parted: bool = False


class Joined(msgspec.Struct, frozen=True, tag=True):
    generation: int


FromRank: TypeAlias = Report | Joined


def write(pipe: BinaryIO, message: ToRank | FromRank) -> None:
    send(pipe, encode(message))


def send(pipe: BinaryIO, encoded: bytes) -> None:
    pipe.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
    pipe.flush()


def read_to_rank(pipe: BinaryIO) -> ToRank:
    return decode(_read(pipe), ToRank, _LIMIT)


def read_from_rank(pipe: BinaryIO) -> FromRank:
    return decode(_read(pipe), FromRank, _LIMIT)


def _read(pipe: BinaryIO) -> bytes:
    """Raises EOFError where the other end is gone."""
    length = pipe.read(_LENGTH_BYTES)
    data = pipe.read(int.from_bytes(length, "little")) if len(length) == _LENGTH_BYTES else b""
    if len(length) < _LENGTH_BYTES or len(data) < int.from_bytes(length, "little"):
        raise EOFError("the other end of a pipe is gone")
    return data
