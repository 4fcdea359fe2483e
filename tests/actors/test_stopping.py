import functools

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorry.actors.sampling.stopping import StopRule
from lorry.wire.types import SamplingParams


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """Some of its tokens are single bytes of a character, some are whole words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["the lorry carries the load, the load is heavy", "日本語 naïve façade 🚚 the lorry\n\nthe end"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def length_at_stop(tokens: list[int], stop: str | list[str | int] | None, end_token: int = -1) -> int | None:
    rule = StopRule.of(SamplingParams(stop=stop), (end_token,))
    return next((i for i in range(1, len(tokens) + 1) if rule.ends(tokens[:i], byte_level())), None)


def test_a_sequence_ends_with_the_token_that_completes_the_string() -> None:
    tokens = byte_level().encode("the lorry carries the load")
    length = length_at_stop(tokens, "lorry")
    assert length is not None
    assert "lorry" in byte_level().decode(tokens[:length])
    assert "lorry" not in byte_level().decode(tokens[: length - 1])


def test_a_string_may_begin_and_end_inside_tokens() -> None:
    tokens = byte_level().encode("the load is heavy")
    assert "oad i" not in "".join(byte_level().convert_ids_to_tokens(tokens))
    length = length_at_stop(tokens, "ad i")
    assert length is not None
    assert "ad i" in byte_level().decode(tokens[:length])


def test_a_character_split_over_tokens_is_found_when_it_is_whole() -> None:
    tokens = byte_level().encode("x🛻y")
    assert len(tokens) > 4
    assert length_at_stop(tokens, "🛻") == len(tokens) - 1


def test_none_stops_at_the_models_end_tokens_and_an_empty_list_nowhere() -> None:
    assert length_at_stop([5, 6, 7, 8], None, end_token=7) == 3
    assert length_at_stop([5, 6, 7, 8], [], end_token=7) is None


def test_strings_and_token_ids_may_be_mixed() -> None:
    tokens = byte_level().encode("the lorry carries")
    assert length_at_stop(tokens, ["carries", tokens[1]]) == 2
    assert length_at_stop(tokens, ["the", tokens[1]]) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=40), st.data())
def test_the_window_finds_what_the_whole_text_would(tokens: list[int], data: st.DataObject) -> None:
    tokenizer = byte_level()
    tokens = [t for t in tokens if t < len(tokenizer)]
    text = tokenizer.decode(tokens)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + data.draw(st.integers(1, 6))]
    assume(stop and "\N{REPLACEMENT CHARACTER}" not in stop)
    expected = next(i for i in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:i]))
    assert length_at_stop(tokens, stop) == expected
