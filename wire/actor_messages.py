"""What the broker and an actor say to each other. Headers only: a micro-batch's payloads follow, one frame an item.

After the welcome they travel over a link (`sequenced`), which neither loses nor repeats any; hello, welcome, a load
that failed and an expulsion travel bare.
"""

from typing import Literal, TypeAlias

import msgspec

from .commands import CommandKind
from .errors import ErrorInfo
from .ids import ActorId, BatchId, FutureId, SessionId
from .tracing import Traceparent
from .types import LoraConfig

VERSION = 8


class Capacity(msgspec.Struct, frozen=True):
    """What one actor takes at a time: `slots` adapters, `token_budget` tokens a micro-batch, `sample_rows` sequences
    that decode together, adapters of at most `max_rank`. While both training and sampling wait, sampling gets
    `sample_share` of the device's time.

    `credits` token budgets may be with the actor at a time: one runs, and what arrives meanwhile waits there, to be
    run together next, so that the device never idles between two and no early bird runs alone.
    """

    slots: int
    token_budget: int
    sample_rows: int
    max_rank: int
    credits: int = 2
    sample_share: float = 0.5


class ModelFacts(msgspec.Struct, frozen=True):
    """`trainable` are the groups of layers that adapters may train: some of attn, mlp, unembed. `frozen_experts` names
    the class of routed experts for which there is no mlp. A sample that asks for no other stop ends with one of
    `end_tokens`."""

    vocab_size: int
    max_context: int
    tokenizer_id: str
    device: str
    dtype: str
    trainable: list[str]
    frozen_experts: str | None = None
    end_tokens: list[int] = []


class ActorHello(msgspec.Struct, frozen=True, tag="hello"):
    """`device_id` is the same for actors that share a device, and for no others."""

    version: int
    token: str
    actor: ActorId
    base_model: str
    capacity: Capacity
    facts: ModelFacts
    pid: int
    device_id: str = ""


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a command ended. Its result, if any, is the frame at the same index. Token counts are the actor's own.

    `cached_prefill_tokens` of the `prefill_tokens` were found computed. `discarded` says that the run's pending
    gradient was dropped: by an optim_step that failed since it was not finite, or by the replay of one. `unrestored`
    says that the run could not be rebuilt from the folder that it was to come from: nothing was executed. `device_s`
    is its share, by tokens, of the seconds that the pass took which it was in. `metrics` are those of the result of a
    `forward_backward` or an `optim_step`, over so many `data`, for the broker looks into no result.
    """

    future: FutureId
    error: ErrorInfo | None = None
    prefill_tokens: int = 0
    sample_tokens: int = 0
    train_tokens: int = 0
    cached_prefill_tokens: int = 0
    size_bytes: int = 0
    checksum: str = ""
    discarded: bool = False
    unrestored: bool = False
    device_s: float | None = None
    metrics: dict[str, float] = {}
    data: int = 0


class Completion(msgspec.Struct, frozen=True, tag="completion", omit_defaults=True):
    """Some commands of a micro-batch ended; `done` gives its credit back, and those that are still being written end
    later. `replay_s` is what it would cost now to
    repeat the commands behind the saved states of its runs, in seconds of the device. `tokens_per_s` is what the actor
    has trained lately, 0 while it has not."""

    batch: BatchId
    outcomes: list[Outcome]
    done: bool
    replay_s: dict[str, float] = {}
    tokens_per_s: float = 0.0


class Made(msgspec.Struct, frozen=True, tag="made"):
    """Tokens of samples whose clients read them as they are made: for each of `futures` a payload, which is a list of
    `streaming.Piece`. What ends with the same step comes in its result alone."""

    futures: list[FutureId]


class SnapshotTaken(msgspec.Struct, frozen=True, tag="snapshot_taken"):
    """The whole training state of a run is in `folder`, complete and durable. It covers its commands up to `seq`;
    `replay_s` is what those behind it have taken since."""

    run: str
    folder: str
    seq: int
    replay_s: float


class SnapshotFailed(msgspec.Struct, frozen=True, tag="snapshot_failed"):
    """There is none in `folder`, and the run goes on without: the actor will try again."""

    run: str
    folder: str
    reason: str


class ActorPing(msgspec.Struct, frozen=True, tag="ping"):
    """`train_s` and `sample_s` are the compute time since the actor started; `swaps` counts adapters moved on or off
    the device. Of its slots so many hold an adapter, and of the cache's blocks so many are held by sequences; others
    are kept, since their prefix is known. `memory_bytes` are what its tensors take of the device, or on a CPU what the
    process takes."""

    train_s: float = 0.0
    sample_s: float = 0.0
    swaps: int = 0
    slots_used: int = 0
    cache_blocks: int = 0
    cache_blocks_held: int = 0
    cache_blocks_kept: int = 0
    memory_bytes: int = 0


class ActorLeaving(msgspec.Struct, frozen=True, tag="leaving"):
    """Nothing more is to be handed out to this actor: it ends what it holds, saves its runs and goes."""


class ActorLeft(msgspec.Struct, frozen=True, tag="left"):
    """It holds nothing any more; its runs are saved."""


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """In place of a hello: the model cannot be served, and why. The process ends."""

    version: int
    token: str
    actor: ActorId
    base_model: str
    error: ErrorInfo


FromActor: TypeAlias = (
    ActorHello | LoadFailed | Completion | Made | SnapshotTaken | SnapshotFailed | ActorPing | ActorLeaving | ActorLeft
)


class ActorWelcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The link is named after the session. A hello that is repeated is welcomed again, to the same one."""

    session: SessionId
    heartbeat_s: float


class AdapterState(msgspec.Struct, frozen=True):
    """Where an adapter comes from, should the actor not hold it: a folder, or else its seed.

    A run's key is its id and its state is the actor's to change; sampler weights are keyed by their folder and fixed.
    `snapshot` is where an actor that does not know the run yet is to write its first snapshot.
    """

    key: str
    lora: LoraConfig
    folder: str | None = None
    snapshot: str | None = None


class Share(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one actor does of a `forward` or `forward_backward` that several execute.

    publish: the run's weights go to the one folder, and nothing else happens. part: of the command's data, divided by
    their lengths into `parts`, those of this `index` are computed with the weights that the adapter comes from; their
    result and gradient go to the one folder. gather: what is in `folders` is the command's result, and is added to the
    run's gradient.
    """

    stage: Literal["publish", "part", "gather"]
    folders: list[str]
    index: int = 0
    parts: int = 1


class Item(msgspec.Struct, frozen=True):
    """`folder` is what a save writes and a load reads; `optimizer` is load_state's.

    Without an adapter, prompts whose `scope` is the same may share what is computed of equal beginnings. It is the
    tenant's, for how much was found computed tells what was asked before.

    `discard` makes an optim_step the replay of one whose outcome was `discarded`: the pending gradient is dropped, and
    nothing is computed. `seq` is a run's command's place in its order. `traceparent` is the span that the actor's is a
    child of.

    The tokens of one to `stream` are told as they are made. One that is `resumed` was begun by another actor: its
    payload is a `streaming.Resumed`.
    """

    future: FutureId
    kind: CommandKind
    adapter: AdapterState | None
    folder: str | None = None
    optimizer: bool = False
    scope: str | None = None
    discard: bool = False
    seq: int = -1
    share: Share | None = None
    stream: bool = False
    resumed: bool = False
    traceparent: Traceparent | None = None


class MicroBatch(msgspec.Struct, frozen=True, tag="micro_batch"):
    """Commands of many runs of one base model. `mode` train: executed at once, phase by phase; sample: each joins the
    decode loop and ends in its own time. `tokens` is the broker's estimate of its size; one
    that is `alone` is not to share a pass with another, since it may be what killed an actor."""

    batch: BatchId
    mode: Literal["train", "sample"]
    items: list[Item]
    tokens: int = 0
    alone: bool = False


class CancelCommand(msgspec.Struct, frozen=True, tag="cancel"):
    future: FutureId


class SnapshotRecorded(msgspec.Struct, frozen=True, tag="snapshot_recorded"):
    """The run's last snapshot is known; its next one goes to `next_folder`."""

    run: str
    next_folder: str


class LeaveNow(msgspec.Struct, frozen=True, tag="leave"):
    """The operator wants this actor to leave, as a signal to its process would."""


class Retired(msgspec.Struct, frozen=True, tag="retired"):
    """All that was handed out to this leaving actor came before this."""


class ActorPong(msgspec.Struct, frozen=True, tag="pong"):
    pass


class Expelled(msgspec.Struct, frozen=True, tag="expelled"):
    """The broker does not count on this actor (bad token, silence, restart): stop, and start afresh."""

    reason: str


ToActor: TypeAlias = (
    ActorWelcome | MicroBatch | CancelCommand | SnapshotRecorded | LeaveNow | Retired | ActorPong | Expelled
)
