"""One run's order: commands take effect by `seq`, whatever order they arrive in. Pure.

A micro-batch may hold several commands of a lane as long as their phases do not go back: forwards and backwards share
one pass over the model, then one optimizer step, then saves, then a load (`wire.commands.PHASES`).
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...wire.commands import PHASES, CommandKind, phase_may_follow
from ...wire.ids import ActorId, FutureId, LaneId, TenantId
from .limits import Holder
from .spreading import Share, Spread

COMPUTE = PHASES["forward"]
CHANGES_WEIGHTS: frozenset[CommandKind] = frozenset(("optim_step", "load_state"))


@dataclass(frozen=True, slots=True)
class Command:
    """`cost` is in tokens, at least 1. A replayed command rebuilds lost state; its result is known and not wanted. One
    with a `share` is what an actor does of a command that several execute; `may_spread` is false of one of which that
    was tried. `prefix` are the marks of a prompt, from its beginning on. `holders` are those whose limits on what is
    sampled at the same time it counts for. A sample's `priority` is among its tenant's samples, as a lane's is among
    its runs."""

    future: FutureId
    lane: LaneId
    seq: int
    kind: CommandKind
    tenant: TenantId
    base_model: str
    cost: int = 1
    rows: int = 1
    replay: bool = False
    share: Share | None = None
    may_spread: bool = True
    prefix: tuple[str, ...] = ()
    holders: tuple[Holder, ...] = ()
    priority: int = 0


@dataclass(slots=True)
class Lane:
    """`next_seq` is the first that was not handed out yet. A lane without state (`lost`) hands out nothing. While a
    command is `spread` over several actors nothing else is. `weights` are the published ones
    that its state has still, None where they were not published.

    Skipped seqs are remembered: a lane whose state is lost goes back to an earlier seq, and must pass them again.
    """

    id: LaneId
    tenant: TenantId
    base_model: str
    next_seq: int = 0
    priority: int = 0
    home: ActorId | None = None
    lost: bool = False
    spread: Spread | None = None
    weights: int | None = None
    _waiting: dict[int, Command] = field(default_factory=dict)
    _replay: deque[Command] = field(default_factory=deque)
    _skipped: set[int] = field(default_factory=set)

    def before(self, seq: int) -> list[Command]:
        """What waits and is to be executed first."""
        return [command for command in self._waiting.values() if command.seq < seq]

    def knows(self, seq: int) -> bool:
        """Whether this seq has been accepted before."""
        return seq < self.next_seq or seq in self._waiting or seq in self._skipped

    def accept(self, command: Command) -> bool:
        """False where this seq has been accepted before."""
        if self.knows(command.seq):
            return False
        self._waiting[command.seq] = command
        return True

    def head(self) -> Command | None:
        """The command that may run next; None while there is none, or the one before it is still missing."""
        if self.lost:
            return None
        if self.spread is not None:
            return self.spread.due()
        return self._replay[0] if self._replay else self._waiting.get(self.next_seq)

    def fits(self, after: int) -> bool:
        """Whether the head may join a micro-batch whose last command of this lane is of phase `after`."""
        head = self.head()
        return head is not None and phase_may_follow(PHASES[head.kind], after)

    def take(self, after: int) -> list[Command]:
        """Remove and return the head, with the step, saves and load right behind it that may share its micro-batch.

        Those cost next to nothing, and so ride along: one round trip carries a backward and its step.
        """
        taken: list[Command] = []
        while (command := self.head()) is not None:
            phase = PHASES[command.kind]
            if taken and (phase == COMPUTE or command.replay != taken[0].replay or not phase_may_follow(phase, after)):
                break
            self._advance(command)
            taken.append(command)
            after = phase
        return taken

    def take_head(self) -> Command:
        """Remove and return the head alone."""
        head = self.head()
        assert head is not None, self.id
        self._advance(head)
        return head

    def _advance(self, command: Command) -> None:
        if command.kind in CHANGES_WEIGHTS:
            self.weights = None
        if self.spread is not None:
            self.spread.is_gathering = True
            return
        if self._replay:
            self._replay.popleft()
            return
        del self._waiting[command.seq]
        self.next_seq += 1
        self._pass_skipped()

    def _pass_skipped(self) -> None:
        while self.next_seq in self._skipped:
            self.next_seq += 1

    def drop(self, seq: int) -> bool:
        """Cancel a command that still waits; those behind it do not wait for it any longer."""
        if self._waiting.pop(seq, None) is None:
            return False
        self.skip((seq,))
        return True

    def spread_out(self, number: int, parts: int) -> Spread:
        """The head is, over several actors; weights that have to be published for it get its number."""
        whole = self.take_head()
        self.weights = number if self.weights is None else self.weights
        self.spread = Spread(number, whole, self.weights, parts)
        return self.spread

    def call_off(self) -> None:
        """Home is to execute the command that is spread, whole."""
        assert self.spread is not None, self.id
        self._put_back(replace(self.spread.whole, may_spread=False))
        self.spread = self.weights = None

    def lose_state(self, in_flight: Iterable[Command]) -> None:
        """The actor is gone: what it was given is to run again, after the state has been restored."""
        self.home, self.lost, self.weights = None, True, None
        self._replay.clear()
        if self.spread is not None:
            self._put_back(self.spread.whole)
            self.spread = None
        for command in in_flight:
            if not command.replay and command.share is None:
                self._put_back(command)

    def _put_back(self, command: Command) -> None:
        self._waiting[command.seq] = command
        self.next_seq = min(self.next_seq, command.seq)

    def skip(self, seqs: Iterable[int]) -> None:
        """These are over already, though commands before them are not."""
        self._skipped.update(seqs)
        self._pass_skipped()

    def restore(self, replay: Iterable[Command]) -> None:
        """A new home starts from a known state, runs `replay` and then goes on."""
        self._replay = deque(replay)
        self.lost = False

    def break_off(self) -> list[Command]:
        """Hand out nothing any more; returns what waited."""
        self.lost = True
        dropped = list(self._waiting.values()) + ([self.spread.whole] if self.spread else [])
        self.spread = None
        self._waiting.clear()
        self._replay.clear()
        return dropped

    @property
    def queued(self) -> int:
        return len(self._waiting)
