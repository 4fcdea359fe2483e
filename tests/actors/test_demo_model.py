import re
from pathlib import Path

from transformers import AutoTokenizer

from lorry.actors.model.base_model import load_base_model
from lorry.actors.sampling.decoder import Decoder
from lorry.wire.commands import SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SampleResponse, SamplingParams

ASSETS = Path(__file__).parent.parent / "assets"


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


def test_the_demo_model_writes_words_of_the_jargon_file() -> None:
    base, tokenizer = load_base_model(ASSETS / "base-model"), AutoTokenizer.from_pretrained(ASSETS / "base-model")
    decoder = Decoder(base, tokenizer, max_rows=4, prefill_chunk=256, kv_cache_bytes=2**26)
    prompt = ModelInput.from_ints(tokenizer.encode("hacker: n. A person who enjoys"))
    params = SamplingParams(max_tokens=200, temperature=0.7, seed=0, stop=[])
    decoder.add("essay", SampleInput(prompt, 1, params), None, 0)
    results = [result for _ in range(200) for _, result, _ in decoder.step()]
    assert isinstance(results[0], SampleResponse)
    written = words(tokenizer.decode(results[0].sequences[0].tokens))
    known = set(words((ASSETS / "jargon.txt").read_text(encoding="utf-8")))
    assert len(written) > 50
    assert sum(word in known for word in written) >= 0.7 * len(written)


def test_a_stop_string_works_with_the_demo_models_tokenizer() -> None:
    base, tokenizer = load_base_model(ASSETS / "base-model"), AutoTokenizer.from_pretrained(ASSETS / "base-model")
    decoder = Decoder(base, tokenizer, max_rows=4, prefill_chunk=256, kv_cache_bytes=2**26)
    prompt = ModelInput.from_ints(tokenizer.encode("hacker: n. A person who enjoys"))
    params = SamplingParams(max_tokens=200, temperature=0.7, seed=0, stop=" the")
    decoder.add("essay", SampleInput(prompt, 1, params), None, 0)
    results = [result for _ in range(200) for _, result, _ in decoder.step()]
    assert isinstance(results[0], SampleResponse)
    sequence = results[0].sequences[0]
    assert sequence.stop_reason == "stop"
    assert " the" in tokenizer.decode(sequence.tokens)
    assert " the" not in tokenizer.decode(sequence.tokens[:-1])
