"""Who computes what in the next step: decoding rows, chunks of prompts, and who gives way when blocks run out. Pure.

It moves blocks and rows about and knows their number; keys, values and tokens it leaves to others.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .block_pool import BlockPool, PrefixKey, next_key, prefix_keys, root_key
from .sequences import Held, Request, Row, Stem

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` of a stem."""

    stem: Stem
    start: int
    end: int

    @property
    def request(self) -> Request:
        return self.stem.request

    @property
    def is_last(self) -> bool:
        return self.end == len(self.stem.tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """One token of every one of `rows`, and `chunks` beside them. `fresh` blocks were handed out for it."""

    rows: list[Row]
    chunks: list[Chunk]
    fresh: list[int]


@dataclass(frozen=True, slots=True)
class Seat:
    """A row that begins or goes on with its stem's logits [vocab], once blocks are copied for it: (from, to)."""

    row: Row
    logits: "Tensor | None"
    copies: list[tuple[int, int]]

    @property
    def request(self) -> Request:
        return self.row.request


class Lineup:
    """At most `max_rows` sequences decode together, and at most `chunk_tokens` of prompts are computed beside them.

    A prompt is begun in order of arrival, when there are blocks for all of it. When a row finds no block for its next
    token, the latest arrival gives all of its own back and is computed again later. `changes` counts how often `rows`
    changed, `preemptions` how often somebody gave way.
    """

    def __init__(self, pool: BlockPool, block_tokens: int, max_rows: int, chunk_tokens: int) -> None:
        self.pool = pool
        self.rows: list[Row] = []
        self.changes = 0
        self.preemptions = 0
        self._queue: deque[Stem] = deque()  # in order of arrival
        self._block_tokens, self._max_rows, self._chunk_tokens = block_tokens, max_rows, chunk_tokens

    def fits(self, request: Request) -> bool:
        """Whether the longest sequence that the request may have finds blocks when nothing else runs."""
        return self._blocks_for(request.most_computed) <= self.pool.blocks

    def join(self, stem: Stem) -> None:
        self._queue.append(stem)

    def remove(self, request: Request) -> None:
        """All that is left of a request; its blocks are free at once."""
        for stem in [stem for stem in self._queue if stem.request is request]:
            self._give_back(stem.held)
            self._queue.remove(stem)
        self.leave([row for row in self.rows if row.request is request])

    def leave(self, rows: list[Row]) -> None:
        """Rows that ended."""
        for row in rows:
            self._give_back(row.held)
            self.rows.remove(row)
        self.changes += bool(rows)

    # A step ----------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Blocks are handed out for what is planned. The caller computes it, all at once or in parts,
        calls `advance` for each part, and then `seat`."""
        fresh: list[int] = []
        at_end = [row for row in self.rows if row.held.computed == len(row.held.blocks) * self._block_tokens]
        for row in sorted(at_end, key=lambda row: row.rank):
            while row in self.rows and not self._extend(row.held, row.held.computed + 1, fresh):
                self._preempt_latest()
        chunks = self._chunks(fresh)
        while not (self.rows or chunks) and self._preempt_behind():
            chunks = self._chunks(fresh)
        return Plan(list(self.rows), chunks, fresh)

    def advance(self, rows: Sequence[Row], chunks: Sequence[Chunk]) -> list[Stem]:
        """These were computed, of a plan. Returns the stems that are complete now, in order."""
        for row in rows:
            row.held.computed += 1
            if row.held.computed % self._block_tokens == 0:
                self._publish(row)
        for chunk in chunks:
            chunk.stem.held.computed = chunk.end
            self._publish(chunk.stem)
        return [chunk.stem for chunk in chunks if chunk.stem.ready]

    def seat(self) -> list[Seat]:
        """Rows of complete stems join, as long as there is room; a stem that none waits for gives its blocks back."""
        seats: list[Seat] = []
        for stem in [stem for stem in self._queue if stem.ready]:
            while stem.ready and stem.waiting and len(self.rows) < self._max_rows:
                seat = self._seat_first(stem)
                if seat is None:
                    break
                seats.append(seat)
            if not stem.waiting:
                self._give_back(stem.held)
                self._queue.remove(stem)
        self.changes += bool(seats)
        return seats

    # Prompts ---------------------------------------------------------------------------------------------------------

    def _chunks(self, fresh: list[int]) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = self._chunk_tokens
        seats = self._max_rows - len(self.rows) - sum(len(stem.waiting) for stem in self._queue if stem.ready)
        for stem in self._queue:
            if budget == 0:
                break
            if stem.ready or (stem.waiting and seats <= 0):
                continue
            end = self._begin(stem, budget)
            if end is None or not self._extend(stem.held, end, fresh):
                break
            chunks.append(Chunk(stem, stem.held.computed, end))
            budget -= end - stem.held.computed
            seats -= len(stem.waiting)
        return chunks

    def _begin(self, stem: Stem, budget: int) -> int | None:
        """How far the stem may be computed now; None where a new one has to wait for blocks."""
        held = stem.held
        if not held.blocks:
            known = self._find_prefix(stem)
            missing = self._blocks_for(len(stem.tokens)) - len(known)
            if self.pool.free < missing + len(self.rows):
                self.pool.release(known)
                return None
            held.blocks, held.computed = known, len(known) * self._block_tokens
            if stem.request.cached_tokens is None:
                stem.request.cached_tokens = min(held.computed, len(stem.request.prompt))
        return min(held.computed + budget, len(stem.tokens))

    def _find_prefix(self, stem: Stem) -> list[int]:
        """Of what is known, all but the last token and what the prompt's logprobs are wanted of."""
        request = stem.request
        if request.owner is None:
            return []
        last = len(stem.tokens) - 1
        if request.scores is not None and not request.scored:
            last = min(last, request.scores.next_position)
        keys = list(prefix_keys(request.owner, stem.tokens[:last], self._block_tokens))
        found = self.pool.find(keys, len(keys))
        stem.held.keys = keys[: len(found)]
        return found

    def _seat_first(self, stem: Stem) -> Seat | None:
        """The last row takes the stem's own blocks; one before it shares the full ones and gets a copy of the rest."""
        row, held, copies = stem.waiting[0], stem.held, list[tuple[int, int]]()
        full = held.computed // self._block_tokens
        own = self.pool.allocate(len(held.blocks) - full) if len(stem.waiting) > 1 else None
        if own is not None:
            self.pool.retain(held.blocks[:full])
            row.held = Held(held.blocks[:full] + own, held.computed, list(held.keys))
            copies = list(zip(held.blocks[full:], own, strict=True))
        elif len(stem.waiting) == 1 or not self.rows:  # no block and nobody who will give one back: the others wait
            row.held, stem.held = held, Held()
        else:
            return None
        stem.waiting.popleft()
        self.rows.append(row)
        return Seat(row, stem.logits, copies)

    # Blocks ----------------------------------------------------------------------------------------------------------

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _extend(self, held: Held, tokens: int, fresh: list[int]) -> bool:
        """Makes room for the first `tokens` of a sequence, all or nothing."""
        blocks = self.pool.allocate(max(0, self._blocks_for(tokens) - len(held.blocks)))
        if blocks is None:
            return False
        held.blocks += blocks
        fresh += blocks
        return True

    def _publish(self, sequence: Row | Stem) -> None:
        held, owner, n = sequence.held, sequence.request.owner, self._block_tokens
        if owner is None:
            return
        key: PrefixKey = held.keys[-1] if held.keys else root_key(owner)
        for i in range(len(held.keys), held.computed // n):
            key = next_key(key, sequence.slice(i * n, (i + 1) * n))
            self.pool.publish(held.blocks[i], key)
            held.keys.append(key)

    def _give_back(self, held: Held) -> None:
        self.pool.release(held.blocks)
        held.blocks, held.computed, held.keys = [], 0, []

    def _preempt_latest(self) -> None:
        stems = [stem for stem in self._queue if stem.held.blocks]
        self._preempt(max([*stems, *self.rows], key=lambda one: one.rank))

    def _preempt_behind(self) -> bool:
        """With no row and no chunk to compute: the latest of those behind the first stem gives way to it."""
        stems = [stem for stem in self._queue if stem.held.blocks]
        if any(stem.ready for stem in stems) or all(stem is self._queue[0] for stem in stems):
            return False
        self._preempt(max((stem for stem in stems if stem is not self._queue[0]), key=lambda stem: stem.rank))
        return True

    def _preempt(self, victim: Row | Stem) -> None:
        self.preemptions += 1
        self._give_back(victim.held)
        if isinstance(victim, Stem):
            victim.logits = None
            return
        self.rows.remove(victim)
        self.changes += 1
        stem = Stem(victim.request, victim.request.prompt + victim.tokens, deque([victim]))
        place = next((i for i, other in enumerate(self._queue) if other.rank > stem.rank), len(self._queue))
        self._queue.insert(place, stem)
