"""From a model's input to what the model reads of it: the images one after the other, decoded beside whoever asks."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from ...wire.model_input import EncodedTextChunk
from .eyes import Eyes, Pixels
from .layout import Counted, Images, Placed, ids_of_image, lay_out_positions
from .pictures import Picture

_AHEAD = 2
"""Of how many images pixels are asked for at a time: of the next one, while the tower has one."""


@dataclass(frozen=True, slots=True)
class Read:
    """`ids` of all tokens are below 0 where an image's are."""

    ids: list[int]
    images: Images | None


class Looking:
    """One input that is being read. An image's ids are made of its bytes: where two sequences have the same ids, they
    have the same images. What was seen is held by what comes of it; `on_host`, in the host's memory."""

    def __init__(self, counted: Counted, eyes: Eyes | None, *, on_host: bool) -> None:
        self._eyes, self._on_host = eyes, on_host
        self._chunks = deque(counted.tokens.chunks)
        self._pictures = deque(counted.pictures)
        self._asked: deque[tuple[Picture, Future[Pixels] | None]] = deque()
        self._ids: list[int] = []
        self._placed: list[Placed] = []

    def go_on(self) -> Read | None:
        """As far as is possible now: None where an image's pixels are not there yet, and where one has gone through the
        tower, which takes time. Call it again then.

        Raises InvalidRequestError for a file that is broken, and what the tower raises where memory runs out; then it
        can be called again, too.
        """
        while self._chunks:
            chunk, looked = self._chunks[0], False
            if isinstance(chunk, EncodedTextChunk):
                self._ids += chunk.tokens
            elif (looked := self._look()) is None:
                return None
            self._chunks.popleft()
            if looked:
                return None
        if not self._placed:
            return Read(self._ids, None)
        return Read(self._ids, lay_out_positions(self._placed, len(self._ids)))

    @property
    def awaited(self) -> "Future[Pixels] | None":
        """What it waits for."""
        pixels = self._asked[0][1] if self._asked else None
        return None if pixels is None or pixels.done() else pixels

    def close(self) -> None:
        """Nobody wants it any more."""
        for _, pixels in self._asked:
            if pixels is not None:
                pixels.cancel()

    def _look(self) -> bool | None:
        """Whether the image went through the tower for this; None where its pixels are still to come."""
        eyes = self._eyes
        assert eyes is not None, "who counted images has eyes"
        while self._pictures and len(self._asked) < _AHEAD:
            picture = self._pictures.popleft()
            self._asked.append((picture, eyes.ask(picture)))
        if self.awaited is not None:
            return None
        picture, pixels = self._asked[0]
        before = eyes.seen
        sight = eyes.see(picture, pixels)
        self._asked.popleft()
        kept = sight.on_host() if self._on_host else sight
        self._placed.append(Placed(len(self._ids), sight.height, sight.width, picture, kept))
        self._ids += ids_of_image(picture.digest, sight.height * sight.width)
        return eyes.seen > before


def read(counted: Counted, eyes: Eyes | None) -> Read:
    """All at once. As `Looking`."""
    looking = Looking(counted, eyes, on_host=False)
    while (done := looking.go_on()) is None:
        if (pixels := looking.awaited) is not None:
            pixels.exception()
    return done
