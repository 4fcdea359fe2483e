"""From a model's input to what the model reads of it: the images one after the other, decoded beside whoever asks."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from ...wire.model_input import ImageChunk, ModelInput
from .eyes import Eyes, Pixels, the_eyes
from .layout import Images, Placed, ids_of_image, lay_out_positions
from .pictures import Picture


@dataclass(frozen=True, slots=True)
class Read:
    """`ids` of all tokens are below 0 where an image's are."""

    ids: list[int]
    images: Images | None


def read(name: str, tokens: ModelInput, eyes: Eyes | None, *, keep: bool) -> Read:
    """All at once. As `Looking`."""
    looking = Looking(name, tokens, eyes, keep=keep)
    while (done := looking.go_on()) is None:
        looking.wait()
    return done


class Looking:
    """One input that is being read. With `keep`, what was seen stays in memory as long as what comes of it.

    An image's ids are made of its bytes: where two sequences have the same ids, they have the same images. Raises
    InvalidRequestError as `Eyes.open` does, and for a file that is broken.
    """

    def __init__(self, name: str, tokens: ModelInput, eyes: Eyes | None, *, keep: bool) -> None:
        self._name, self._eyes, self._keep = name, eyes, keep
        self._left = deque(enumerate(tokens.chunks))
        self._ids: list[int] = []
        self._placed: list[Placed] = []
        self._picture: Picture | None = None
        self._pixels: Future[Pixels] | None = None

    def go_on(self, *, after_one: bool = True) -> Read | None:
        """As far as is possible now: None where an image's pixels are not there yet, or, unless `after_one`, where one
        has gone through the tower, which takes time. Call it again then."""
        while self._left:
            index, chunk = self._left[0]
            if not isinstance(chunk, ImageChunk):
                self._ids += chunk.tokens
            elif (looked := self._look(f"{self._name}.chunks[{index}]", chunk)) is None:
                return None
            elif looked and not after_one:
                self._left.popleft()
                return None
            self._left.popleft()
        if not self._placed:
            return Read(self._ids, None)
        return Read(self._ids, lay_out_positions(self._placed, len(self._ids)))

    @property
    def lacks_pixels(self) -> bool:
        return self._pixels is not None and not self._pixels.done()

    def wait(self) -> None:
        """Until the pixels are there that it lacks; what is wrong with them, `go_on` says."""
        if self._pixels is not None:
            self._pixels.exception()

    def _look(self, where: str, chunk: ImageChunk) -> bool | None:
        """Whether the image went through the tower for this; None where its pixels are still to come."""
        eyes = the_eyes(where, self._eyes)
        if self._picture is None:
            self._picture, _ = eyes.open(where, chunk)
            self._pixels = eyes.ask(self._picture)
        picture, pixels = self._picture, self._pixels
        if pixels is not None and not pixels.done():
            return None
        before = eyes.seen
        sight = eyes.see(picture, pixels)
        kept = sight if self._keep else None
        self._placed.append(Placed(len(self._ids), sight.height, sight.width, picture, kept))
        self._ids += ids_of_image(picture.digest, sight.height * sight.width)
        self._picture = self._pixels = None
        return eyes.seen > before
