"""Pieces of sequences, told in any order, twice, or not at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.wire.codec import encode
from lorry.wire.errors import StreamDivergedError
from lorry.wire.streaming import Assembly, Piece, made_before
from lorry.wire.types import SampledSequence, SampleResponse


def sequence(tokens: list[int]) -> SampledSequence:
    top = [[(token, -0.5), (token + 1, -1.5)] for token in tokens]
    return SampledSequence("stop" if len(tokens) % 2 else "length", tokens, [-float(t) for t in tokens], top)


sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12).map(sequence), min_size=1, max_size=3)


@st.composite
def told(draw: st.DrawFn) -> tuple[SampleResponse, list[Piece]]:
    """A response, and pieces of it: some twice, some over each other, some missing, in any order."""
    response = SampleResponse(draw(sequences))
    pieces: list[Piece] = []
    for _ in range(draw(st.integers(0, 12))):
        sample = draw(st.integers(0, len(response.sequences) - 1))
        found = response.sequences[sample]
        start = draw(st.integers(0, len(found.tokens)))
        end = draw(st.integers(start, len(found.tokens)))
        top = found.topk_logprobs and found.topk_logprobs[start:end]
        reason = found.stop_reason if end == len(found.tokens) else None
        pieces.append(Piece(sample, start, found.tokens[start:end], found.logprobs[start:end], top, reason))
    return response, pieces


@given(told())
def test_pieces_and_the_result_give_each_token_once_and_in_order(drawn: tuple[SampleResponse, list[Piece]]) -> None:
    response, pieces = drawn
    assembly = Assembly(len(response.sequences))
    news = [new for piece in pieces for new in assembly.add([piece])] + assembly.rest(response)
    for sample, found in enumerate(response.sequences):
        mine = [piece for piece in news if piece.sample == sample]
        assert [token for piece in mine for token in piece.tokens] == found.tokens
        assert [logprob for piece in mine for logprob in piece.logprobs] == found.logprobs
        assert [top for piece in mine for top in piece.topk_logprobs or []] == found.topk_logprobs
        assert [piece.stop_reason for piece in mine if piece.stop_reason] == [found.stop_reason]
        assert mine[-1].stop_reason is not None
    assert assembly.rest(response) == []


@given(told(), st.data())
def test_what_was_computed_anew_and_is_another_is_told_so(
    drawn: tuple[SampleResponse, list[Piece]], data: st.DataObject
) -> None:
    response, pieces = drawn
    assembly = Assembly(len(response.sequences))
    assembly.add(pieces)
    sample = data.draw(st.integers(0, len(response.sequences) - 1))
    known, found = assembly.told[sample], response.sequences[sample].tokens
    if not known.tokens:
        return
    at = data.draw(st.integers(0, len(known.tokens) - 1))
    other = SampledSequence("length", [*found[:at], found[at] + 100, *found[at + 1 :]], [0.0] * len(found))
    shorter = SampledSequence("stop", found[:at], [0.0] * at)
    for wrong in (other, shorter):
        with pytest.raises(StreamDivergedError):
            Assembly.rest(assembly, SampleResponse([*response.sequences[:sample], wrong]))


@given(told())
def test_another_actor_goes_on_where_what_was_told_ends(drawn: tuple[SampleResponse, list[Piece]]) -> None:
    response, pieces = drawn
    resumed = made_before([encode([piece]) for piece in pieces], len(response.sequences))
    for known, found in zip(resumed.told, response.sequences, strict=True):
        assert known.tokens == found.tokens[: len(known.tokens)]
        assert len(known.logprobs) == len(known.topk_logprobs) == len(known.tokens)


def test_a_piece_of_a_sample_that_nobody_asked_for_is_nothing() -> None:
    assert Assembly(1).add([Piece(1, 0, [1], [0.0]), Piece(-1, 0, [1], [0.0]), Piece(0, -1, [1], [0.0])]) == []
