"""A model with eyes, asked about a picture over OpenAI's and Anthropic's APIs: it sees what Lorry's client shows it."""

import base64
from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest
from transformers import AutoTokenizer

import lorry
from tests.actors.models import tiny_qwen3_vl
from tests.actors.pictures import file, picture, published_processor
from tests.conftest import Server, start_server

from .test_templates import folders  # noqa: F401  a fixture

SIZE = (96, 64)
PNG = file(picture(*SIZE, 7))
VOCAB = 2200


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Server]:  # noqa: F811
    folder = tmp_path_factory.mktemp("seeing")
    tiny_qwen3_vl(patch_size=16, vocab_size=VOCAB, max_position_embeddings=4096).save_pretrained(folder)
    published_processor().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folders["qwen3_vl"]).save_pretrained(folder)
    server = start_server(tmp_path_factory.mktemp("data"), "--http", "127.0.0.1:0", model=f"seeing={folder}")
    yield server
    server.stop()


async def test_it_sees_what_lorrys_own_client_shows_it(seeing: Server, folders: dict[str, Path]) -> None:  # noqa: F811
    key, tokenizer = seeing.new_key("alice"), AutoTokenizer.from_pretrained(folders["qwen3_vl"])
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    rendered: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in rendered.split("<|image_pad|>"))
    chunks = [lorry.EncodedTextChunk(before), lorry.ImageChunk(PNG, "png"), lorry.EncodedTextChunk(after)]
    params = lorry.SamplingParams(max_tokens=8, temperature=0, stop=[])
    async with lorry.connect(seeing.address, api_key=key) as service:
        sampler = await service.create_sampling_client_async(base_model="seeing")
        expected = (await sampler.sample_async(lorry.ModelInput(chunks), 1, params)).sequences[0]
    encoded = base64.b64encode(PNG).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    asked = [{"role": "user", "content": [shown, {"type": "text", "text": "What is it?"}]}]
    async with openai.AsyncOpenAI(base_url=f"{seeing.url}/v1", api_key=key, max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="seeing",
            messages=asked,  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            logprobs=True,
        )
        found = answer.choices[0].logprobs
        assert found is not None and found.content is not None and answer.usage is not None
        assert [each.logprob for each in found.content] == pytest.approx(
            expected.logprobs[: len(found.content)], abs=1e-4
        )
        assert len(found.content) >= 1
        assert answer.usage.prompt_tokens > len(before) + len(after) + 1, "an image is several tokens"
        far = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
        with pytest.raises(openai.BadRequestError, match="image_url"):
            await client.chat.completions.create(model="seeing", messages=[{"role": "user", "content": [far]}])  # type: ignore[list-item]
    source = {"type": "base64", "media_type": "image/png", "data": encoded}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    async with anthropic.AsyncAnthropic(base_url=seeing.url, api_key=key, max_retries=0) as client:
        message = await client.messages.create(
            model="seeing",
            max_tokens=8,
            extra_body={"temperature": 0},
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
        )
    assert message.content[0].type == "text"
    assert message.content[0].text == answer.choices[0].message.content
