"""What is sampled becomes text, thoughts and calls: whatever the tokens, and however they come in pieces."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from lorry.gateway.chat.calls import object_call, objects_call, separated_call, tagged_call
from lorry.gateway.chat.detokenizing import Detokenizer
from lorry.gateway.chat.events import Call, Content, Event, Reasoning, joined
from lorry.gateway.chat.lexing import Lexer, Mark, Scanner, Text
from lorry.gateway.chat.parsing import HARMONY_MARKS
from lorry.gateway.chat.speaking import Speech
from lorry.gateway.chat.syntaxes import Syntax, syntax_of
from lorry.gateway.chat.vocabulary import Vocabulary, is_byte_level
from tests.conftest import BASE_MODEL


def vocabulary_of(tokenizer: Tokenizer, special: Iterable[str] = ()) -> Vocabulary:
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    state = tokenizer.decoder.__getstate__().decode()
    ids = frozenset(added[name] for name in special)
    return Vocabulary(
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
        tokenizer.id_to_token,
        added,
        ids,
        is_byte_level(state),
    )


def spelling_bytes() -> Tokenizer:
    """As Llama 2's and Mistral's: words with a bar for their space, and single bytes for all else."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁a",
        "a",
        "b",
        "▁bc",
        "é",
        "你",
        "▁the",
        "\ufffd",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


BYTE_LEVEL = AutoTokenizer.from_pretrained(BASE_MODEL).backend_tokenizer
SPELLING = spelling_bytes()
TOKENIZERS = {"byte level": vocabulary_of(BYTE_LEVEL), "spelling bytes": vocabulary_of(SPELLING)}
SIZES = {"byte level": BYTE_LEVEL.get_vocab_size(), "spelling bytes": SPELLING.get_vocab_size()}
RARE = {"byte level": st.integers(3, 262), "spelling bytes": st.integers(1, 256)}
"""Tokens of one byte, most of which are part of a character, or of none."""


def test_the_two_ways_to_spell_are_told_apart() -> None:
    assert [vocabulary.byte_level for vocabulary in TOKENIZERS.values()] == [True, False]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_pieces_of_text_are_the_text_and_never_end_in_half_a_character(kind: str, data: st.DataObject) -> None:
    vocabulary = TOKENIZERS[kind]
    tokens = data.draw(st.lists(RARE[kind] | st.integers(0, SIZES[kind] - 1), max_size=60))
    detokenizer = Detokenizer(vocabulary)
    pieces = [detokenizer.feed(token) for token in tokens]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join([*pieces, detokenizer.flush()]) == vocabulary.decode(tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(alphabet=st.sampled_from("abc é你😀\n"), max_size=40))
def test_text_comes_out_as_it_went_in(kind: str, text: str) -> None:
    if kind == "byte level":
        tokens = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
        detokenizer = Detokenizer(TOKENIZERS[kind])
        assert "".join([*map(detokenizer.feed, tokens), detokenizer.flush()]) == text


def test_a_run_of_bytes_that_are_no_character_costs_no_more_than_its_length() -> None:
    asked: list[int] = []

    def decode(tokens: list[int]) -> str:
        asked.append(len(tokens))
        return "\ufffd" * len(tokens)

    detokenizer = Detokenizer(Vocabulary(decode, lambda token: "x"))
    told = "".join([*(detokenizer.feed(1) for _ in range(10_000)), detokenizer.flush()])
    assert told == "\ufffd" * 10_000
    assert sum(asked) < 100_000


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_text_ends_before_the_first_stop_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    pieces = cut(text, data)
    scanner = Scanner([], stops)
    told = "".join(lexeme.text for piece in pieces for lexeme in scanner.feed(piece) if isinstance(lexeme, Text))
    told += "".join(lexeme.text for lexeme in scanner.flush() if isinstance(lexeme, Text))
    ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert told == text and scanner.stopped is None
        return
    first = min(ends.values())
    which = max((stop for stop, end in ends.items() if end == first), key=len)
    assert (told, scanner.stopped) == (text[: first - len(which)], which)


def cut(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def test_nothing_that_may_begin_a_stop_is_told() -> None:
    scanner = Scanner([], ["END", "</s>"])
    assert scanner.feed("the E") == [Text("the ")]
    assert scanner.feed("N") == []
    assert scanner.feed("C</") == [Text("ENC")]
    assert scanner.feed("s>more") == [] and scanner.stopped == "</s>"


# Marks, by token and by text ------------------------------------------------------------------------------------------

WORDS = ["<|over|>", "<tool_call>", "</tool_call>", "<think>", "</think>", "x"]
TAGS = {word: i for i, word in enumerate(WORDS[:-1])}


def spelt(marks: bool) -> tuple[Vocabulary, Any]:
    """Letters as bytes, and the tags as tokens of their own, or not."""
    added = TAGS if marks else {"<|over|>": 0}
    texts = {number: name for name, number in added.items()}

    def decode(tokens: list[int]) -> str:
        return "".join(texts.get(token, chr(token - 100) if token >= 100 else "") for token in tokens)

    def encode(text: str) -> list[int]:
        return [100 + ord(character) for character in text]

    return Vocabulary(decode, lambda t: texts.get(t) or chr(t - 100), added, frozenset([0])), encode


def test_a_mark_that_is_a_token_is_known_by_the_token_and_text_that_looks_like_it_is_text() -> None:
    vocabulary, encode = spelt(marks=True)
    lexer = Lexer(vocabulary, ("<tool_call>", "</tool_call>"))
    found = [*lexer.feed([*encode("<tool_call>"), TAGS["<tool_call>"], *encode("a")]), *lexer.end()]
    assert "".join(lexeme.text for lexeme in found if isinstance(lexeme, Text)) == "<tool_call>a"
    assert [lexeme for lexeme in found if isinstance(lexeme, Mark)] == [Mark("<tool_call>")]


def test_a_mark_that_is_no_token_is_known_by_its_text() -> None:
    vocabulary, encode = spelt(marks=False)
    lexer = Lexer(vocabulary, ("<tool_call>", "</tool_call>"))
    assert [*lexer.feed(encode("a<tool_call>")), *lexer.end()] == [Text("a"), Mark("<tool_call>")]


# Syntaxes -------------------------------------------------------------------------------------------------------------

SCHEMAS = {"look": {"properties": {"place": {"type": "string"}, "days": {"type": "integer"}}}}
HERMES = syntax_of("<think></think><tool_call>")
XML = syntax_of("<tool_call><function=")
DEEPSEEK = syntax_of("</think><｜tool▁call▁begin｜>")
LLAMA = syntax_of('<|start_header_id|> "parameters"')
HARMONY = syntax_of("<|channel|>")
KIMI = syntax_of("<|tool_call_begin|>")
CALL = Call("look", '{"place": "Rome", "days": 2}')
JSON = '{"place": "Rome", "days": 2}'


def said(syntax: Syntax, pieces: Iterable[str], *, thinks: bool = False, tools: bool = True) -> list[Event]:
    vocabulary, encode = spelt(marks=False)
    speech = Speech(vocabulary, syntax, SCHEMAS if tools else {}, (), thinks=thinks)
    events = [event for piece in pieces for event in speech.feed(encode(piece))]
    return joined([*events, *speech.end()])


TURNS: dict[str, tuple[Syntax, str, bool, list[Event]]] = {
    "hermes": (
        HERMES,
        f'<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{{"name": "look", "arguments": {JSON}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "look", "arguments": {{}}}}\n</tool_call>',
        False,
        [Reasoning("hm"), Content("I look."), CALL, Call("look", "{}")],
    ),
    "hermes, opened by the template": (HERMES, "\nhm\n</think>\n\nYes.\n", True, [Reasoning("hm"), Content("Yes.\n")]),
    "xml": (
        XML,
        "<tool_call>\n<function=look>\n<parameter=place>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>",
        False,
        [CALL],
    ),
    "deepseek 3.1": (
        DEEPSEEK,
        "</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>"
        f"{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        True,
        [Content("I look."), CALL],
    ),
    "deepseek 3": (
        DEEPSEEK,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{JSON}\n```<｜tool▁call▁end｜>",
        False,
        [CALL],
    ),
    "kimi": (
        KIMI,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_calls_section_end|>",
        False,
        [CALL],
    ),
    "llama": (LLAMA, f'{{"name": "look", "parameters": {JSON}}}', False, [CALL]),
    "llama, marked": (LLAMA, f'<|python_tag|>{{"name": "look", "parameters": {JSON}}}', False, [CALL]),
    "harmony": (
        HARMONY,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.look "
        f"<|constrain|>json<|message|>{JSON}<|call|>",
        False,
        [Reasoning("hm"), CALL],
    ),
    "harmony, called by its role": (
        HARMONY,
        f" to=functions.look<|channel|>commentary json<|message|>{JSON}<|call|>",
        False,
        [CALL],
    ),
    "harmony, said": (HARMONY, "<|channel|>final<|message|>Rome.<|return|>", False, [Content("Rome.")]),
}
UNREADABLE: dict[str, tuple[Syntax, str]] = {
    "hermes, no JSON": (HERMES, '<tool_call>\n{"name": look}\n</tool_call> then'),
    "hermes, cut off": (HERMES, 'I look.\n<tool_call>\n{"name": "lo'),
    "hermes, no name": (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    "hermes, arguments that are none": (HERMES, '<tool_call>{"name": "look", "arguments": [1]}</tool_call>'),
    "hermes, not a number": (HERMES, '<tool_call>{"name": "look", "arguments": {"a": NaN}}</tool_call>'),
    "xml": (XML, "<tool_call>\n<function=look>\n<parameter=place>\nRome\n</function>\n</tool_call>"),
    "deepseek": (DEEPSEEK, "<｜tool▁call▁begin｜>look<｜tool▁sep｜>{]<｜tool▁call▁end｜>"),
    "llama": (LLAMA, '{"name": "look", "parameters": {"place": "Ro'),
    "llama, another object": (LLAMA, '{"a": 1}'),
}


@pytest.mark.parametrize("turn", TURNS)
@given(data=st.data())
def test_a_turn_says_the_same_however_it_comes_in_pieces(turn: str, data: st.DataObject) -> None:
    syntax, text, thinks, expected = TURNS[turn]
    assert said(syntax, cut(text, data), thinks=thinks) == expected


@pytest.mark.parametrize("turn", UNREADABLE)
@given(data=st.data())
def test_a_call_that_cannot_be_read_is_text_and_none_of_it_is_lost(turn: str, data: st.DataObject) -> None:
    syntax, text = UNREADABLE[turn]
    assert said(syntax, cut(text, data)) == [Content(text)]


@pytest.mark.parametrize("syntax", [HERMES, XML, DEEPSEEK, KIMI, LLAMA, HARMONY, syntax_of("")], ids=lambda s: s.name)
@given(data=st.data())
def test_whatever_is_sampled_nothing_breaks_and_pieces_do_not_matter(syntax: Syntax, data: st.DataObject) -> None:
    words = [*syntax.all_marks(True), "\n", " ", "{", "}", '{"name": "look"}', "look", "<", "to=functions.look", "x"]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=20)))
    thinks = data.draw(st.booleans())
    assert said(syntax, cut(text, data), thinks=thinks) == said(syntax, [text], thinks=thinks)


def test_without_tools_a_call_is_text() -> None:
    text = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    assert said(HERMES, [text], tools=False) == [Content(text)]
    assert said(LLAMA, ['{"name": "look", "parameters": {}}'], tools=False) == [
        Content('{"name": "look", "parameters": {}}')
    ]


def test_what_was_called_before_a_stop_string_is_called() -> None:
    vocabulary, encode = spelt(marks=False)
    speech = Speech(vocabulary, HERMES, SCHEMAS, ("</tool_call>",), thinks=False)
    tokens = encode(f'<tool_call>{{"name": "look", "arguments": {JSON}}}</tool_call>')
    assert joined([*speech.feed(tokens), *speech.end()]) == [CALL]
    assert speech.stopped_by() == "</tool_call>"


def test_syntaxes_are_told_from_templates() -> None:
    names = [s.name for s in (HERMES, XML, DEEPSEEK, KIMI, LLAMA, HARMONY, syntax_of("{{ messages }}"))]
    assert names == ["hermes", "qwen-xml", "deepseek", "kimi", "llama", "harmony", "plain"]
    assert HARMONY.marks == HARMONY_MARKS


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_arguments_are_always_json_that_others_can_read(value: object) -> None:
    text = json.dumps({"name": "f", "arguments": value})
    for read in (object_call, objects_call, separated_call("|"), tagged_call):
        for call in read(text, {}) or read(f"f|{json.dumps(value)}", {}) or ():
            json.loads(call.arguments, parse_constant=lambda constant: pytest.fail(constant))
