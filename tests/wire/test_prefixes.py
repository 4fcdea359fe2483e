"""Marks of prompts: those that begin alike share the marks of what they share, and no others."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lorry.wire.model_input import EncodedTextChunk, ImageChunk, ModelInput
from lorry.wire.prefixes import MARKS_AT_MOST, prefix_marks

TOKENS = st.lists(st.integers(0, 3), max_size=400)


@given(TOKENS, st.lists(st.integers(0, 400), max_size=4))
def test_marks_do_not_depend_on_how_a_prompt_is_cut_into_chunks(tokens: list[int], cuts: list[int]) -> None:
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    pieces = ModelInput([EncodedTextChunk(tokens[a:b]) for a, b in pairwise(edges)])
    assert prefix_marks(pieces) == prefix_marks(ModelInput.from_ints(tokens))
    assert len(prefix_marks(pieces)) == len(tokens) // 64


@given(TOKENS, TOKENS, TOKENS)
def test_prompts_share_the_marks_of_what_they_share(begin: list[int], one: list[int], other: list[int]) -> None:
    a, b = (prefix_marks(ModelInput.from_ints(begin + rest)) for rest in (one, other))
    alike = next((i for i, (x, y) in enumerate(zip(begin + one, begin + other, strict=False)) if x != y), None)
    shared = (len(begin) + min(len(one), len(other)) if alike is None else alike) // 64
    assert a[:shared] == b[:shared]
    assert not set(a[shared:]) & set(b[shared:])


def test_long_prompts_have_no_more_marks_and_share_them_with_shorter_ones() -> None:
    text = [i % 1000 for i in range(100_000)]
    long, short = (prefix_marks(ModelInput.from_ints(text[:n])) for n in (100_000, 2_000))
    assert len(long) <= MARKS_AT_MOST and len(short) <= MARKS_AT_MOST
    half = prefix_marks(ModelInput.from_ints(text[:50_000]))
    assert set(long) & set(half), "every other one of the shorter prompt's"
    assert all(0 <= mark < 2**62 for mark in long)


def test_what_an_image_shows_counts() -> None:
    def marks(data: bytes) -> list[int]:
        before, behind = EncodedTextChunk([1] * 64), EncodedTextChunk([2] * 64)
        return prefix_marks(ModelInput([before, ImageChunk(data, "png"), behind]))

    assert marks(b"a") == marks(b"a")
    assert marks(b"a")[0] == marks(b"b")[0] and marks(b"a")[1] != marks(b"b")[1]
