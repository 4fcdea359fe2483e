"""Names for the beginnings of prompts: two prompts that begin alike share some, whoever computes them. Pure."""

from hashlib import blake2b

import numpy as np

from .model_input import ImageChunk, ModelInput

MARKS_AT_MOST = 32
_STRIDE = 64
"""Tokens from one mark to the next; twice as many, and again, in prompts that would have too many marks."""


def prefix_marks(prompt: ModelInput) -> list[int]:
    """One for each of some beginnings of `prompt`, the shortest first: a digest of its tokens so far, of 62 bits.

    Of a prompt with images their bytes count, and only text has marks.
    """
    text = sum(0 if isinstance(chunk, ImageChunk) else len(chunk.tokens) for chunk in prompt.chunks)
    stride = _STRIDE
    while text // stride > MARKS_AT_MOST:
        stride *= 2
    marks: list[int] = []
    digest, place = blake2b(digest_size=8), 0
    for chunk in prompt.chunks:
        if isinstance(chunk, ImageChunk):
            digest.update(blake2b(chunk.data).digest())
            continue
        tokens, start = np.asarray(chunk.tokens, dtype="<i8").tobytes(), 0
        for end in range(stride - place % stride, len(chunk.tokens) + 1, stride):
            digest.update(tokens[8 * start : 8 * end])
            marks.append(int.from_bytes(digest.digest(), "little") >> 2)
            start = end
        digest.update(tokens[8 * start :])
        place += len(chunk.tokens)
    return marks
