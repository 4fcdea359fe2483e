"""Tokens to text, piece by piece: never half of a character, and all pieces together are the whole text decoded. Pure.

Text goes out where nothing that comes later can change it: it ends with a whole character, and not with one of the
bytes in which some tokenizers spell a run of what they have no words for.
"""

from .vocabulary import Vocabulary

_UNKNOWN = "\ufffd"
_TRY_EACH = 16
"""Tokens that wait for the end of a character before it is looked for less often."""


class Detokenizer:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._context: list[int] = []
        self._context_text = ""
        self._waiting: list[int] = []
        self._try_at = 0

    def feed(self, token: int) -> str:
        """What can be told of the text by now."""
        self._waiting.append(token)
        if len(self._waiting) < self._try_at or not self._vocabulary.ends_whole(token):
            return ""
        text = self._text()
        if not text or text.endswith(_UNKNOWN):
            if len(self._waiting) >= _TRY_EACH:
                self._try_at = len(self._waiting) * 5 // 4
            return ""
        return self._told(text)

    def flush(self) -> str:
        """The rest, for nothing comes that could complete it: before a token that is not text, or at the end."""
        return self._told(text) if self._waiting and (text := self._text()) else ""

    def _text(self) -> str:
        """What the tokens that wait add to those before: the first of a text may decode without its space."""
        return self._vocabulary.decode(self._context + self._waiting)[len(self._context_text) :]

    def _told(self, text: str) -> str:
        self._context, self._waiting, self._try_at = self._waiting, [], 0
        self._context_text = self._vocabulary.decode(self._context)
        return text
