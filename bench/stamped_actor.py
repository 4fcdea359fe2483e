"""`lorry actor` as it is, but that it writes into the file STAMPS when each streamed token was there: a line for each
piece, with the moment on the monotonic clock, and the first token's logprob, by which it is known again."""

import os
import time
from collections.abc import Hashable

from lorry.actors.sampling.decoder import Decoder
from lorry.cli import app
from lorry.wire.streaming import Piece


def patch(path: str) -> None:
    pieces, stamps = Decoder.pieces, open(path, "a", buffering=1)  # noqa: SIM115  as long as the process

    def stamped(self: Decoder) -> list[tuple[Hashable, list[Piece]]]:
        now, found = time.monotonic(), pieces(self)
        for _, told in found:
            for piece in told:
                print(now, piece.logprobs[0], file=stamps)
        return found

    Decoder.pieces = stamped


if __name__ == "__main__":
    patch(os.environ["STAMPS"])
    app()
