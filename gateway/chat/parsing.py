"""Lexemes to events, as they come: what a model thinks, says and calls. A call that cannot be read is text. Pure.

How text is cut into pieces on its way changes nothing of what comes out.
"""

from typing import Protocol

from .calls import ReadCalls, Schemas, named_call, objects_call
from .events import Call, Content, Event, Reasoning
from .lexing import Lexeme, Mark, Text


class Parser(Protocol):
    def feed(self, lexeme: Lexeme) -> list[Event]: ...

    def end(self) -> list[Event]:
        """What was held back until more was known."""
        ...


class Plain:
    """All is said as it stands."""

    def feed(self, lexeme: Lexeme) -> list[Event]:
        return [Content(_written(lexeme))]

    def end(self) -> list[Event]:
        return []


class Tagged:
    """What it thinks between two marks, and calls between two others, as most models have it.

    Line breaks around what is thought, before a call and after the last one are part of the syntax, and not told.
    """

    def __init__(
        self,
        think: tuple[str, str] | None,
        call: tuple[str, str] | None,
        read: ReadCalls,
        schemas: Schemas,
        *,
        thinks: bool,
    ) -> None:
        """`thinks` says that the prompt ended in the middle of what it thinks."""
        self._think, self._call, self._read, self._schemas = think, call, read, schemas
        self._thinks, self._in_call = thinks, False
        self._body = self._held = ""
        self._begins, self._called = thinks, False

    def feed(self, lexeme: Lexeme) -> list[Event]:
        if self._in_call:
            return self._feed_call(lexeme)
        match lexeme:
            case Mark(name) if self._think and not self._thinks and name == self._think[0]:
                self._thinks = self._begins = True
                held, self._held = self._held, ""
                return self._told(held) if held.strip() else []
            case Mark(name) if self._think and self._thinks and name == self._think[1]:
                self._thinks, self._begins, self._held = False, True, ""
                return []
            case Mark(name) if self._call and not self._thinks and name == self._call[0]:
                self._in_call = True
                return []
            case _:
                return self._feed_text(_written(lexeme))

    def end(self) -> list[Event]:
        events: list[Event] = []
        if self._in_call:
            self._in_call = False
            events = self._called_or_said("")
        held, self._held = self._held, ""
        if held and not (self._called and not held.strip()):
            events += self._told(held)
        return events

    def _feed_text(self, text: str) -> list[Event]:
        if self._begins and not self._held:
            text = text.lstrip("\n")
            self._begins = not text
        text = self._held + text
        kept = "" if self._called and not text.strip() else text.rstrip("\n")
        self._held = text[len(kept) :]
        if not kept:
            return []
        self._called = False
        return self._told(kept)

    def _feed_call(self, lexeme: Lexeme) -> list[Event]:
        assert self._call
        if lexeme != Mark(self._call[1]):
            self._body += _written(lexeme)
            return []
        self._in_call = False
        return self._called_or_said(self._call[1])

    def _called_or_said(self, closing: str) -> list[Event]:
        """`closing` is what ended it."""
        assert self._call
        body, self._body = self._body, ""
        calls = self._read(body, self._schemas)
        if calls is not None:
            self._held, self._called = "", True
            return list(calls)
        held, self._held = self._held, ""
        return self._told(f"{held}{self._call[0]}{body}{closing}")

    def _told(self, text: str) -> list[Event]:
        return [Reasoning(text) if self._thinks else Content(text)]


class Objects:
    """A turn that is nothing but JSON objects, or begins with the mark of a call, is calls, as Llama has it."""

    def __init__(self, mark: str, schemas: Schemas) -> None:
        self._mark, self._schemas = mark, schemas
        self._held = ""
        self._calls: bool | None = None
        self._marked = False

    def feed(self, lexeme: Lexeme) -> list[Event]:
        if lexeme == Mark(self._mark) and not self._calls:
            held, self._held = self._held, ""
            self._calls = self._marked = True
            return [Content(held)] if held.strip() else []
        if self._calls is False:
            return [Content(_written(lexeme))]
        self._held += _written(lexeme)
        if self._calls is None and (begun := self._held.lstrip()):
            self._calls = begun.startswith("{")
        if self._calls is not False:
            return []
        held, self._held = self._held, ""
        return [Content(held)]

    def end(self) -> list[Event]:
        held, self._held = self._held, ""
        calls = objects_call(held, self._schemas) if self._calls else None
        if calls is not None:
            return list(calls)
        said = self._mark * self._marked + held
        return [Content(said)] if said else []


_START, _CHANNEL, _CONSTRAIN, _MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
HARMONY_ENDS = ("<|end|>", "<|return|>", "<|call|>")
HARMONY_MARKS = (_START, _CHANNEL, _CONSTRAIN, _MESSAGE, *HARMONY_ENDS)
_CALLED = "to="


class Harmony:
    """Messages with channels, as GPT-OSS has it: analysis is what it thinks, final what it says, and commentary to a
    function a call."""

    def __init__(self, schemas: Schemas) -> None:
        self._takes_calls = bool(schemas)
        self._head: str | None = ""
        self._channel, self._function = "final", ""
        self._body = ""

    def feed(self, lexeme: Lexeme) -> list[Event]:
        if self._head is not None:
            return self._feed_head(lexeme)
        if isinstance(lexeme, Mark) and lexeme.name in (*HARMONY_ENDS, _START):
            self._head = ""
            return self._over()
        if self._function:
            self._body += _written(lexeme)
            return []
        return [self._told(_written(lexeme))]

    def end(self) -> list[Event]:
        if self._head is None:
            return self._over()
        head, self._head = self._head, None
        said = head.removeprefix("assistant") if _CHANNEL not in head else head
        return [Content(said)] if said.strip() else []

    def _feed_head(self, lexeme: Lexeme) -> list[Event]:
        assert self._head is not None
        match lexeme:
            case Mark(name) if name == _MESSAGE:
                self._channel, self._function = _addressed(self._head)
                self._head = None
            case Mark(name) if name == _START or name in HARMONY_ENDS:
                said, self._head = self.end(), ""
                return said
            case _:
                self._head += _written(lexeme)
        return []

    def _over(self) -> list[Event]:
        body, function = self._body, self._function
        self._body = self._function = ""
        if not function:
            return []
        call = named_call(function, body) if self._takes_calls else None
        return [call or Content(body)] if call or body else []

    def _told(self, text: str) -> Event:
        return Reasoning(text) if self._channel == "analysis" else Content(text)


def _addressed(head: str) -> tuple[str, str]:
    """The channel and the function that a message's head names."""
    _, _, after = head.partition(_CHANNEL)
    channel = (after.replace(_CONSTRAIN, " ").split() or ["final"])[0]
    words = head.replace(_CHANNEL, " ").replace(_CONSTRAIN, " ").split()
    to = next((word.removeprefix(_CALLED) for word in words if word.startswith(_CALLED)), "")
    return channel, to.removeprefix("functions.")


def _written(lexeme: Lexeme) -> str:
    return lexeme.text if isinstance(lexeme, Text) else lexeme.name


__all__ = ["HARMONY_ENDS", "HARMONY_MARKS", "Call", "Harmony", "Objects", "Parser", "Plain", "Tagged"]
