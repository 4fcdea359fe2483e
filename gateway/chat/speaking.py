"""One sampled sequence, from its tokens to what a model says: the vocabulary's text, its syntax, its stops. Pure."""

from collections.abc import Sequence

from .calls import Schemas
from .events import Event, joined
from .lexing import Lexeme, Lexer, Mark
from .syntaxes import Syntax
from .vocabulary import Vocabulary

_BEFORE = 4
"""Tokens that are decoded ahead of those that can hold a stop string."""


class Speech:
    def __init__(
        self, vocabulary: Vocabulary, syntax: Syntax, schemas: Schemas, stops: Sequence[str], *, thinks: bool
    ) -> None:
        self._vocabulary, self._silent, self._stops = vocabulary, frozenset(syntax.silent), stops
        self._lexer = Lexer(vocabulary, syntax.all_marks(bool(schemas)), stops)
        self._parser = syntax.parser(schemas, thinks)
        self._tail: list[int] = []
        self._tail_at_most = max((len(stop.encode()) for stop in stops), default=0) + _BEFORE

    def feed(self, tokens: list[int]) -> list[Event]:
        self._tail = [*self._tail, *tokens][-self._tail_at_most :]
        return self._events(self._lexer.feed(tokens))

    def end(self) -> list[Event]:
        return joined([*self._events(self._lexer.end()), *self._parser.end()])

    def stopped_by(self) -> str | None:
        """Which of the stop strings ended it, once it has."""
        if self._lexer.stopped is not None or not self._stops:
            return self._lexer.stopped
        text = self._vocabulary.decode(self._tail)
        return next((stop for stop in self._stops if stop in text), None)

    def _events(self, lexemes: list[Lexeme]) -> list[Event]:
        found: list[Event] = []
        for lexeme in lexemes:
            if not (isinstance(lexeme, Mark) and lexeme.name in self._silent):
                found += self._parser.feed(lexeme)
        return joined(found)
