"""Which blocks of the cache are free, whose they are, and which hold a known prefix. Pure: it knows no tensor.

A block is a place for a fixed number of tokens. Full blocks may be shared and are never written again; they are found
by the hash of all the tokens up to their end.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from itertools import islice
from typing import NewType

import numpy as np

PrefixKey = NewType("PrefixKey", bytes)
"""Of a whole prefix and of who computed it, in 16 bytes."""


def prefix_keys(owner: str, tokens: Sequence[int], block_tokens: int) -> Iterator[PrefixKey]:
    """Of each full block of `tokens`, in order. `owner` names what computed them; keys of two owners never meet."""
    key = root_key(owner)
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        key = next_key(key, tokens[start : start + block_tokens])
        yield key


def root_key(owner: str) -> PrefixKey:
    """Of the empty prefix."""
    return PrefixKey(blake2b(owner.encode(), digest_size=16).digest())


def next_key(key: PrefixKey, block: Sequence[int]) -> PrefixKey:
    """Of the prefix of `key` and one full block of tokens after it."""
    return PrefixKey(blake2b(np.asarray(block, dtype=np.int64).tobytes(), digest_size=16, key=key).digest())


class BlockPool:
    """Blocks 0 to `blocks` - 1. Each is unused, held (once or more), or kept: held by nobody, but its prefix is known.

    Unused blocks go lowest first, so that memory which was never needed is never touched; then the prefix that was
    least recently let go is forgotten.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._untouched = 0  # this one and all above were never used
        self._unused: list[int] = []  # a heap of those below
        self._holders: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently let go first
        self._key_of: dict[int, PrefixKey] = {}
        self._block_of: dict[PrefixKey, int] = {}

    @property
    def free(self) -> int:
        """How many can be allocated, kept ones among them."""
        return self.blocks - len(self._holders)

    @property
    def kept(self) -> int:
        """How many nobody holds, and are kept since their prefix is known."""
        return len(self._kept)

    def holders(self, block: int) -> int:
        return self._holders.get(block, 0)

    def allocate(self, count: int) -> list[int] | None:
        """All of `count` blocks, with one holder each, or none of them."""
        if count > self.free:
            return None
        chosen = [self._take() for _ in range(count)]
        self._holders |= dict.fromkeys(chosen, 1)
        return chosen

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, which are held or kept."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each of a sequence's `blocks`. What nobody holds is kept if its prefix is known."""
        for block in reversed(blocks):  # the end of a prefix is to be forgotten before its beginning
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_of:
                self._kept[block] = None
            else:
                heappush(self._unused, block)

    def publish(self, block: int, key: PrefixKey) -> None:
        """A held block is full, and its prefix has this key. The first of several with one key is the one to find."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, keys: Sequence[PrefixKey], limit: int) -> list[int]:
        """The blocks of the longest known prefix of at most `limit` blocks, with one more holder each."""
        found: list[int] = []
        for key in islice(keys, limit):
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        self.retain(found)
        return found

    def _take(self) -> int:
        if self._unused:
            return heappop(self._unused)
        if self._untouched < self.blocks:
            self._untouched += 1
            return self._untouched - 1
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
