"""The first rank's side of a group: it starts the others, and tells them what to do with it.

The death of any rank ends the group. One that merely fails, for want of memory or by a bug, is told of by the command
that failed; the ranks break off what is under way, join anew and go on.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from select import poll
from tempfile import TemporaryDirectory
from typing import BinaryIO, Self, TypeVar

import structlog

from ...wire.codec import encode
from ..model.ranks import Ranks, RanksPartedError
from .connecting import ranks_of
from .messages import Command, FromRank, GoOn, Joined, Order, Regroup, Report, ToRank, read_from_rank, send

log = structlog.get_logger("lorry.group")

T = TypeVar("T")
_FOLLOWER = ("-m", "lorry.actors.group.follower")


def _end_process(rank: int) -> None:
    log.error("a rank of this actor has ended; the others end with it, and another actor takes over", rank=rank)
    os._exit(1)  # the compute thread may wait for the dead for ever


class Group:
    """`size` ranks, of which this process is the first; `program` are the others. `ended` is called with the number of
    one that died, from a thread of its own."""

    def __init__(
        self,
        size: int,
        device: str,
        threads: int,
        *,
        ended: Callable[[int], None] = _end_process,
        program: Sequence[str] = _FOLLOWER,
    ) -> None:
        self._stack = ExitStack()
        self._folder = TemporaryDirectory(prefix="lorry-group-")
        meeting = Path(self._stack.enter_context(self._folder)) / "meeting"
        self._pipes: dict[int, tuple[BinaryIO, BinaryIO]] = {}  # to each, and from each
        self._ended, self._is_closing = ended, False
        self.processes = [self._start(program, rank, size, device, threads, meeting) for rank in range(1, size)]
        threading.Thread(target=self._watch, daemon=True).start()
        self.ranks: Ranks = ranks_of(meeting, 0, size, device)
        self._orders = self._generation = 0
        self._under_way: list[int] = []
        self._failed: dict[int, Report] = {}  # by the order's number
        with self.ranks.together():
            self.ranks.join(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._is_closing = True
        for to_rank, from_rank in self._pipes.values():
            with suppress(BrokenPipeError):  # one that is dead already
                to_rank.close()  # what tells them to end
            from_rank.close()
        for process in self.processes:
            process.wait()
        self.ranks.leave()
        self._stack.close()

    def run(self, model: int, command: Command, mine: Callable[[], T]) -> T:
        """See `Lead.run`. Where a rank was not there because it has failed in the pass that waits for this, that is no
        fault of the command's: it is executed once more, since all are together again."""
        try:
            return self._run(model, command, mine)
        except RanksPartedError:
            if not any(number in self._failed for number in self._under_way):
                raise
            return self._run(model, command, mine)

    def _run(self, model: int, command: Command, mine: Callable[[], T]) -> T:
        number = self._orders = self._orders + 1
        self._under_way.append(number)
        try:
            self._tell(Order(number, model, command))
            with self.ranks.together():
                result = mine()
            self._await_all(number)
            return result
        except BaseException as error:
            if not self.ranks.can_part:
                log.exception("a command failed among several devices, which ends them")
                self._ended(0)
            self._regroup(number)
            told = self._failed.pop(number, None)
            if isinstance(error, RanksPartedError) and told is not None:
                raise _failure(told) from error
            raise
        finally:
            self._under_way.pop()
            self._failed.pop(number, None)

    def go_on(self, beside_others: bool) -> None:
        """Raises RanksPartedError where another rank has failed in what is under way."""
        if self.ranks.state != "together":
            return
        if self._under_way[-1] in self._failed:
            raise RanksPartedError("another rank has failed")
        self._tell(GoOn(beside_others))

    def _start(
        self, program: Sequence[str], rank: int, size: int, device: str, threads: int, meeting: Path
    ) -> "subprocess.Popen[bytes]":
        orders, to_rank = os.pipe()
        from_rank, reports = os.pipe()
        words = [str(word) for word in (rank, size, device, threads, meeting, orders, reports)]
        process = subprocess.Popen(
            [sys.executable, "-P", *program, *words],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # ours has a reader who expects other things
            pass_fds=(orders, reports),
        )
        os.close(orders)
        os.close(reports)
        self._pipes[rank] = os.fdopen(to_rank, "wb"), os.fdopen(from_rank, "rb")
        return process

    def _watch(self) -> None:
        waiting = poll()
        ranks = {from_rank.fileno(): rank for rank, (_, from_rank) in self._pipes.items()}
        for descriptor in ranks:
            waiting.register(descriptor, 0)  # for its end alone, whatever is unread
        for descriptor, _ in waiting.poll():
            if not self._is_closing:
                self._folder.cleanup()  # nobody meets there any more
                self._ended(ranks[descriptor])

    def _tell(self, message: ToRank) -> None:
        encoded = encode(message)
        for to_rank, _ in self._pipes.values():
            send(to_rank, encoded)

    def _await_all(self, number: int) -> None:
        """Until every rank has executed the order. Raises RanksPartedError where one has not."""

        def is_the_end(message: FromRank) -> bool:
            # Who has failed in a pass that waits for this order does not come to it.
            return isinstance(message, Report) and (message.number == number or message.failed is not None)

        for rank, (_, from_rank) in self._pipes.items():
            message = self._hear(rank, from_rank, is_the_end)
            if isinstance(message, Report) and message.failed is not None:
                raise RanksPartedError("another rank has failed")

    def _regroup(self, number: int) -> None:
        """Every rank breaks off that order, which this one has left, and joins again."""
        self.ranks.leave()
        self._generation += 1
        self._tell(Regroup(self._generation, number))
        with self.ranks.together():
            self.ranks.join(self._generation)
        for rank, (_, from_rank) in self._pipes.items():
            self._hear(rank, from_rank, lambda message: message == Joined(self._generation))

    def _hear(self, rank: int, from_rank: BinaryIO, is_the_end: Callable[[FromRank], bool]) -> FromRank:
        while True:
            message = read_from_rank(from_rank)
            if isinstance(message, Report) and message.failed is not None:
                if message.trace is not None:
                    log.error("a rank has failed", rank=rank, exception=message.trace)
                elif not message.is_parted:
                    log.warning("a rank has failed", rank=rank, why=message.failed)
                known = self._failed.get(message.number)
                # The reason is with who did not merely miss another.
                if message.number in self._under_way and (known is None or known.is_parted):
                    self._failed[message.number] = message
            if is_the_end(message):
                return message


def _failure(report: Report) -> Exception:
    if report.is_parted:
        return RanksPartedError(report.failed)
    return MemoryError(report.failed) if report.is_memory else RuntimeError(f"another rank raised {report.failed}")
