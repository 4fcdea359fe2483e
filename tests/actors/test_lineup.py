"""The lineup alone, with requests that have no model: who computes what, and that all come to their end."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.actors.sampling.block_pool import BlockPool
from lorry.actors.sampling.lineup import Lineup
from lorry.actors.sampling.sequences import Request, Row, Stem
from lorry.actors.sampling.stopping import StopRule
from lorry.wire.types import SamplingParams

BLOCK = 4


class Letters:
    def decode(self, token_ids: list[int], **_: bool) -> str:
        raise AssertionError("nothing is to be decoded")


def new_request(arrival: int, prompt: int, samples: int, new: int, owner: str | None = None) -> Request:
    params = SamplingParams(stop=[])
    sequences = [None] * samples
    rule = StopRule.of(params, ())
    return Request(arrival, arrival, [7] * prompt, None, owner, params, rule, 0, new, sequences=list(sequences))


def join(lineup: Lineup, request: Request) -> None:
    rows = [Row(request, i, i) for i in range(len(request.sequences))]
    lineup.join(Stem(request, request.prompt, deque(rows)))


def step(lineup: Lineup) -> list[Request]:
    """As the decoder does, with 1 for every token. Returns the requests that ended."""
    plan = lineup.plan()
    written = [row.held.blocks[row.held.computed // BLOCK] for row in plan.rows]
    written += [
        block
        for chunk in plan.chunks
        for block in chunk.stem.held.blocks[chunk.start // BLOCK : -(-chunk.end // BLOCK)]
    ]
    assert all(lineup.pool.holders(block) == 1 for block in written), "a shared block is never written"
    assert len(set(written)) == len(written)
    lineup.advance(plan.rows, plan.chunks)
    seats = lineup.seat()
    ended = [row for row in (*plan.rows, *(seat.row for seat in seats)) if row.accept(1, 0.0, None, Letters())]
    lineup.leave([row for row in ended if row in lineup.rows])
    return [row.request for row in ended if row.request.complete]


requests = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(1, 12), st.sampled_from(["a", "b", None])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(
    wanted=requests,
    blocks=st.integers(8, 24),
    rows=st.integers(1, 6),
    chunk=st.integers(1, 24),
    late=st.integers(0, 8),
    cancelled=st.integers(0, 20),
)
def test_all_requests_end_and_give_every_block_back(
    wanted: list[tuple[int, int, int, str | None]], blocks: int, rows: int, chunk: int, late: int, cancelled: int
) -> None:
    pool = BlockPool(blocks)
    lineup = Lineup(pool, BLOCK, rows, chunk)
    everyone = [new_request(i, *one) for i, one in enumerate(wanted)]
    for request in everyone[:late]:
        join(lineup, request)
    ended: list[Request] = []
    for at in range(1500):
        if at == 5:
            for request in everyone[late:]:
                join(lineup, request)
        if at == cancelled:
            lineup.remove(everyone[0])
        ended += step(lineup)
        if at > max(5, cancelled) and len(set(ended) | {everyone[0]}) == len(everyone):
            break
    assert set(ended) | {everyone[0]} == set(everyone)
    lineup.remove(everyone[0])
    assert pool.free == blocks
    lengths = {request.arrival: [len(s.tokens) for s in request.sequences if s is not None] for request in ended}
    assert all(lengths[request.arrival] == [request.max_new_tokens] * len(request.sequences) for request in ended)


def test_no_decoding_row_misses_a_step_while_a_long_prompt_is_computed() -> None:
    lineup = Lineup(BlockPool(400), BLOCK, max_rows=16, chunk_tokens=64)
    for i in range(15):
        join(lineup, new_request(i, 4, 1, 100))
    for _ in range(3):
        step(lineup)
    assert len(lineup.rows) == 15
    decoding = list(lineup.rows)
    before = [len(row.tokens) for row in decoding]
    join(lineup, new_request(15, 1000, 1, 10))
    steps = 0
    while len(lineup.rows) == 15:
        plan = lineup.plan()
        assert sum(chunk.end - chunk.start for chunk in plan.chunks) <= 64
        lineup.advance(plan.rows, plan.chunks)
        lineup.seat()
        for row in plan.rows:
            row.accept(1, 0.0, None, Letters())
        steps += 1
    assert steps == 16  # 1,000 tokens, 64 at a time
    assert [len(row.tokens) for row in decoding] == [n + steps for n in before]


def test_the_latest_arrival_gives_way_and_everyone_else_goes_on() -> None:
    lineup = Lineup(BlockPool(8), BLOCK, max_rows=4, chunk_tokens=64)
    for i in range(2):
        join(lineup, new_request(i, 8, 1, 20))
    ended: list[Request] = []
    for _ in range(40):
        ended += step(lineup)
    assert lineup.preemptions > 0
    assert [request.arrival for request in ended] == [0, 1]


def test_a_request_that_no_pool_of_this_size_can_hold_does_not_fit() -> None:
    lineup = Lineup(BlockPool(8), BLOCK, max_rows=4, chunk_tokens=64)
    assert lineup.fits(new_request(0, 12, 4, 21))
    assert not lineup.fits(new_request(0, 13, 1, 21))
    assert lineup.fits(new_request(0, 32, 0, 0))
    assert not lineup.fits(new_request(0, 33, 0, 0))


@pytest.mark.parametrize(("prompt", "new"), [(1, 32), (17, 16), (31, 2), (32, 1)])
def test_a_pool_of_exactly_the_right_size_holds_a_sequence_that_fits_to_the_token(prompt: int, new: int) -> None:
    lineup = Lineup(BlockPool(8), BLOCK, max_rows=4, chunk_tokens=5)
    request = new_request(0, prompt, 2, new)
    assert lineup.fits(request)
    join(lineup, request)
    ended = [one for _ in range(200) for one in step(lineup)]
    assert set(ended) == {request}
    assert [len(sequence.tokens) for sequence in request.sequences if sequence is not None] == [new, new]
