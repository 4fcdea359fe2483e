import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorry.actors.sampling.block_pool import BlockPool, PrefixKey, prefix_keys

BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Sequences that hold blocks, share prefixes and let go, against a plain count of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.sequences: list[list[int]] = []
        self.prefix_of: dict[int, PrefixKey] = {}  # what a block held when it was published

    @rule(count=st.integers(0, BLOCKS + 1))
    def begin(self, count: int) -> None:
        free = self.pool.free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == count
            held = {block for sequence in self.sequences for block in sequence}
            assert not held & set(blocks), "a block that somebody holds is never handed out"
            for block in blocks:
                self.prefix_of.pop(block, None)
            self.sequences.append(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.pool.retain(sequence)
        self.sequences.append(list(sequence))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.pool.release(self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.integers(0, 3))
    def publish(self, data: st.DataObject, tokens: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        for block, key in zip(sequence, prefix_keys("owner", [tokens] * 2 * len(sequence), 2), strict=True):
            if self.prefix_of.setdefault(block, key) != key:
                break  # a full block is never written again, so nobody publishes other tokens of it
            self.pool.publish(block, key)

    @rule(tokens=st.integers(0, 3), limit=st.integers(0, BLOCKS))
    def find(self, tokens: int, limit: int) -> None:
        keys = list(prefix_keys("owner", [tokens] * 2 * BLOCKS, 2))
        found = self.pool.find(keys, limit)
        assert [self.prefix_of[block] for block in found] == keys[: len(found)]
        assert len(found) <= limit
        self.sequences.append(found)

    @invariant()
    def every_holder_is_counted_and_no_block_is_lost(self) -> None:
        held = [block for sequence in self.sequences for block in sequence]
        assert all(self.pool.holders(block) == held.count(block) for block in range(BLOCKS))
        assert self.pool.free == BLOCKS - len(set(held))

    def teardown(self) -> None:
        for sequence in self.sequences:
            self.pool.release(sequence)
        assert sorted(self.pool.allocate(BLOCKS) or []) == list(range(BLOCKS))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_blocks_that_were_never_used_go_last_and_lowest_first() -> None:
    pool = BlockPool(8)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    pool.release([1])
    assert pool.allocate(2) == [1, 3]


def test_the_prefix_let_go_longest_ago_is_forgotten_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    old, new = (list(prefix_keys(owner, [7] * 4, 2)) for owner in ("old", "new"))
    for keys in (old, new):
        blocks = pool.allocate(2)
        assert blocks is not None
        for block, key in zip(blocks, keys, strict=True):
            pool.publish(block, key)
        pool.release(blocks)
    assert pool.allocate(1) is not None
    assert (len(pool.find(old, 2)), len(pool.find(new, 2))) == (1, 2)


@pytest.mark.parametrize(("owner", "tokens"), [("a", [1, 2, 3, 5]), ("b", [1, 2, 3, 4])])
def test_another_owner_or_another_token_is_another_prefix(owner: str, tokens: list[int]) -> None:
    keys, others = list(prefix_keys("a", [1, 2, 3, 4], 2)), list(prefix_keys(owner, tokens, 2))
    assert keys[1] != others[1]


def test_only_full_blocks_have_keys() -> None:
    assert len(list(prefix_keys("a", list(range(11)), 4))) == 2
