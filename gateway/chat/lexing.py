"""What a model says, as text and marks: tags and special tokens that mean something, apart from the text that spells
the same. It ends before a stop string. Pure.

A mark that is one token of the vocabulary is known by the token alone: text that looks like it is text. One that is not
is known by its text.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .detokenizing import Detokenizer
from .vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    name: str


Lexeme: TypeAlias = Text | Mark


class Scanner:
    """Finds `marks` and `stops` in text that comes in pieces, and holds back what may be the beginning of one."""

    def __init__(self, marks: Collection[str], stops: Sequence[str]) -> None:
        self._marks, self._stops = frozenset(marks), frozenset(stops)
        self._needles = sorted({*marks, *stops}, key=len, reverse=True)
        self._held = ""
        self.stopped: str | None = None

    def feed(self, text: str) -> list[Lexeme]:
        found: list[Lexeme] = []
        self._held += text
        while self.stopped is None and (hit := self._first()):
            needle, start = hit
            _say(found, self._held[:start])
            if needle in self._stops:
                self.stopped, self._held = needle, ""
                return found
            found.append(Mark(needle))
            self._held = self._held[start + len(needle) :]
        if self.stopped is not None:
            self._held = ""
            return found
        keep = self._beginning()
        _say(found, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return found

    def flush(self) -> list[Lexeme]:
        """What was held back is text after all."""
        held, self._held = self._held, ""
        return [Text(held)] if held else []

    def _first(self) -> tuple[str, int] | None:
        """That which ends first, and of these the longest: so it does not matter how the text was cut."""
        at = {needle: self._held.find(needle) for needle in self._needles}
        hits = [(start + len(needle), -len(needle), needle, start) for needle, start in at.items() if start >= 0]
        return min(hits)[2:] if hits else None

    def _beginning(self) -> int:
        """How many of the last characters may begin a needle."""
        longest = 0
        for needle in self._needles:
            for length in range(min(len(needle) - 1, len(self._held)), longest, -1):
                if self._held.endswith(needle[:length]):
                    longest = length
                    break
        return longest


class Lexer:
    """Of one sequence. `stopped` is the stop string that it ended with."""

    def __init__(self, vocabulary: Vocabulary, marks: Collection[str] = (), stops: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._by_token = {vocabulary.added[mark]: mark for mark in marks if mark in vocabulary.added}
        self._detokenizer = Detokenizer(vocabulary)
        self._scanner = Scanner([mark for mark in marks if mark not in vocabulary.added], stops)

    @property
    def stopped(self) -> str | None:
        return self._scanner.stopped

    def feed(self, tokens: Iterable[int]) -> list[Lexeme]:
        found: list[Lexeme] = []
        for token in tokens:
            if token in self._by_token or token in self._vocabulary.special:
                found += self._break()
                if self.stopped is None and token in self._by_token:
                    found.append(Mark(self._by_token[token]))
            elif text := self._detokenizer.feed(token):
                found += self._scanner.feed(text)
        return found

    def end(self) -> list[Lexeme]:
        return self._break()

    def _break(self) -> list[Lexeme]:
        """A token that is no text is in the way of whatever began before it."""
        return [*self._scanner.feed(self._detokenizer.flush()), *self._scanner.flush()]


def _say(found: list[Lexeme], text: str) -> None:
    if text:
        found.append(Text(text))
