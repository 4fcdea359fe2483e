"""Images through a real service: the native client, the official SDK, a model that can see in its actor."""

import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import torch

import lorry
from tests.actors.hostile import hostile, usual
from tests.actors.models import tiny_qwen3_vl
from tests.actors.pictures import END, IMAGE, START, as_the_model_takes, between, chunk, file, picture, save_processor
from tests.actors.test_images import plain_logprobs
from tests.conftest import BASE_MODEL, Server, start_server
from tests.gateway.conftest import Tenant

SEEING = "seeing"
TEXT = lorry.ModelInput.from_ints([3, 1, 4, 1, 5])
PARAMS = lorry.SamplingParams(max_tokens=2, seed=3, stop=[])
CONTEXT = 256


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("seeing")
    tiny_qwen3_vl().save_pretrained(folder)
    save_processor(folder)
    for name in BASE_MODEL.glob("token*"):
        shutil.copy(name, folder)
    data = tmp_path_factory.mktemp("images")
    server = start_server(data, "--http", "127.0.0.1:0", model=f"{SEEING}={folder}")
    yield server
    assert server.stop() in (0, 130)


def row(tokens: lorry.ModelInput, length: int) -> lorry.Datum:
    """The last three targets count."""
    targets, weights = [0] * (length - 3) + [7, 8, 9], [0.0] * (length - 3) + [1.0] * 3
    return lorry.Datum(tokens, {"target_tokens": targets, "weights": weights})  # type: ignore[dict-item]


PICTURE = between([1, 2], chunk(32, 32, 1), [7, 8])
ROW = row(PICTURE, 22)


def shown(image: lorry.ImageChunk) -> lorry.ModelInput:
    text = lorry.EncodedTextChunk
    return lorry.ModelInput([text([1, 2, START]), image, text([END, 7, 8])])


async def test_images_train_and_sample_through_the_native_client_and_outlive_an_actor(seeing: Server) -> None:
    tokens = between([5], chunk(24, 16, 2), [6], chunk(8, 32, 3), [7, 8])
    length = 1 + 2 + 6 + 1 + 2 + 4 + 2
    async with lorry.connect(seeing.address, api_key=seeing.new_key("native")) as service:
        losses: list[list[float]] = []
        for kills in (False, True):
            training = await service.create_lora_training_client_async(SEEING, rank=4, seed=1)
            mine: list[float] = []
            for step in range(3):
                passed = await training.forward_backward([row(tokens, length), ROW], "cross_entropy")
                mine.append(passed.metrics["loss:sum"])
                if kills and step == 1:
                    actors = psutil.Process(seeing.process.pid).children(recursive=True)
                    next(p for p in actors if f"{SEEING}#0" in p.cmdline()).kill()
                await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
            losses.append(mine)
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert losses[0][2] < losses[0][0]
        sampler = await training.save_weights_and_get_sampling_client_async()
        sampled = await sampler.sample_async(tokens, 2, PARAMS, include_prompt_logprobs=True)
        assert [len(sequence.tokens) for sequence in sampled.sequences] == [2, 2]
        assert sampled.prompt_logprobs is not None
        assert sum(logprob is None for logprob in sampled.prompt_logprobs) == 1 + 6 + 4
        assert await sampler.compute_logprobs_async(tokens) == pytest.approx(sampled.prompt_logprobs, abs=1e-5)


def test_the_sdks_images_give_the_models_own_logprobs_and_are_billed(seeing: Server, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "16-a.png").write_bytes(file(picture(32, 32, 1)))
    (images / "6-b.jpg").write_bytes(file(picture(24, 16, 2), "jpeg"))
    tenant = Tenant(seeing, seeing.new_key("sdk"))
    seen = tenant.run("images.shown", str(images))
    model = tiny_qwen3_vl()
    for i, image in enumerate(sorted(images.iterdir())):
        tokens = shown(lorry.ImageChunk(image.read_bytes(), "png" if image.suffix == ".png" else "jpeg"))
        expected = plain_logprobs(model, tokens)
        ids = as_the_model_takes(tokens)["input_ids"][0]
        trained = expected[-3:].gather(1, torch.tensor([[7], [8], [9]]))[:, 0]
        assert seen["logprobs"][i][-3:] == pytest.approx(trained.tolist(), abs=1e-4)
        assert seen["tokens"][i][0] == expected[-1].argmax().item()
        found = seen["prompt_logprobs"][i]
        assert [logprob is None for logprob in found] == [True, *(ids[1:] == IMAGE).tolist()]
        own = expected[:-1].gather(1, ids[1:, None])[:, 0].tolist()
        assert [a for a in found[1:] if a is not None] == pytest.approx(
            [b for a, b in zip(found[1:], own, strict=True) if a is not None], abs=1e-4
        )
    assert seen["scored"] == pytest.approx(seen["prompt_logprobs"][0], abs=1e-5)
    assert all(after < before for before, after in pairwise(seen["losses"]))
    rows = 2 * (2 + 1 + 1 + 2) + 16 + 6
    billed = Counter[str]()
    for line in tenant.lorry("usage", "--tenant", "sdk").splitlines():
        if "sdk" in line:
            _, _, _, kind, tokens, _ = (word for word in line.split() if word != "│")
            billed[kind] += int(tokens)
    assert billed["train"] == 4 * rows
    assert billed["prefill"] + billed["cached_prefill"] == 2 * rows + 16 + 6


def test_hostile_files_are_refused_to_the_sdk_and_the_run_goes_on(seeing: Server) -> None:
    seen = Tenant(seeing, seeing.new_key("hostile sdk")).run("images.refused")
    assert_refused(seen["said"])
    assert "prompt.chunks[1] is image_asset_pointer" in seen["pointed"]
    assert "Lorry keeps none and fetches none" in seen["pointed"]
    assert len(seen["sampled"]) == len(hostile()) + 1
    assert len(set(map(tuple, seen["sampled"]))) == 1
    assert seen["after"] == pytest.approx([seen["after"][0]] * len(hostile()), rel=1e-5)


def assert_refused(said: dict[str, list[str]]) -> None:
    assert len(said) == len(hostile()) >= 20
    for one in hostile():
        trained, sampled = said[one.name]
        assert "data[0].model_input.chunks[1]" in trained and one.says in trained, one.name
        assert "prompt.chunks[1]" in sampled and one.says in sampled, one.name


async def test_hostile_files_are_refused_to_the_native_client_and_disturb_nobody(seeing: Server) -> None:
    """A bystander's losses on the same actor are those it has alone."""
    said: dict[str, list[str]] = {}
    losses: list[list[float]] = [[], []]

    async def stand_by(service: lorry.ServiceClient, mine: list[float]) -> None:
        training = await service.create_lora_training_client_async(SEEING, rank=4, seed=9)
        for _ in range(8):
            passed = training.forward_backward([ROW, row(TEXT, 5)], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
            mine.append((await passed).metrics["loss:sum"])

    async def attack(service: lorry.ServiceClient) -> None:
        training = await service.create_lora_training_client_async(SEEING, rank=4, seed=1)
        sampler = await service.create_sampling_client_async(base_model=SEEING)
        first = (await training.forward([ROW], "cross_entropy")).metrics["loss:sum"]
        for one in hostile():
            image = lorry.ImageChunk(one.data, one.format, one.expected_tokens)  # type: ignore[arg-type]
            length = 6 + (one.expected_tokens or 16)
            said[one.name] = [
                await refusal(training.forward_backward([row(shown(image), length)], "cross_entropy")),
                await refusal(sampler.sample(shown(image), 1, PARAMS)),
            ]
            again = (await training.forward([ROW], "cross_entropy")).metrics["loss:sum"]
            assert again == pytest.approx(first, rel=1e-5), one.name
            assert len((await sampler.sample_async(PICTURE, 1, PARAMS)).sequences[0].tokens) == 2

    key, other = seeing.new_key("hostile"), seeing.new_key("bystander")
    async with (
        lorry.connect(seeing.address, api_key=key) as service,
        lorry.connect(seeing.address, api_key=other) as theirs,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attack, service)
            tasks.start_soon(stand_by, theirs, losses[0])
        await stand_by(theirs, losses[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_refused(said)


async def refusal(future: Any) -> str:
    with pytest.raises(lorry.InvalidRequestError) as refused:
        await future
    return str(refused.value)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (lorry.ImageChunk("a/path.png", "png"), "data[0].model_input.chunks[1].data is 'str', expected bytes"),  # type: ignore[arg-type]
        (lorry.ImageChunk(usual(), "webp"), "data[0].model_input.chunks[1].format is 'webp'"),  # type: ignore[arg-type]
        (lorry.ImageChunk(usual(), "png", 0), "data[0].model_input.chunks[1].expected_tokens is 0"),
    ],
)
async def test_a_mistake_about_an_image_is_told_where_it_was_made(
    seeing: Server, image: lorry.ImageChunk, says: str
) -> None:
    async with lorry.connect(seeing.address, api_key=seeing.new_key("mistaken")) as service:
        training = await service.create_lora_training_client_async(SEEING, rank=2)
        with pytest.raises(lorry.InvalidRequestError) as refused:
            training.forward([row(shown(image), 22)], "cross_entropy")
        assert says in str(refused.value)
        assert (await training.forward([ROW], "cross_entropy")).metrics["loss:sum"] > 0
