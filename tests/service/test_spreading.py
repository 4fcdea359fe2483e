"""A run whose passes take one actor too long, in a service with three of them, as its owner sees it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.lowlevel import checkpoint

import lorry
from tests.conftest import MODEL, Server, start_server
from tests.service.test_recovery import STEP
from tests.service.test_training import datum

DATA = [datum(i, 8 + 5 * i) for i in range(12)]
A_STEP = sum(each.model_input.length for each in [*DATA, *DATA[3:]])
"""How many tokens a step of `curve` trains."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("three"), "--replicas", "3", "--spread-after-s", "0")
    yield server
    server.stop()


def actors_of(server: Server) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.process.pid).children() if "actor" in child.cmdline()]


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await checkpoint()


async def curve(training: lorry.TrainingClient, steps: int) -> list[tuple[float, float]]:
    """Loss, and norm of the gradient, of two passes a step."""
    found: list[tuple[float, float]] = []
    for _ in range(steps):
        passes = [
            training.forward_backward(DATA, "cross_entropy"),
            training.forward_backward(DATA[3:], "cross_entropy"),
        ]
        step = training.optim_step(STEP)
        losses = [(await future).metrics["loss:sum"] for future in passes]
        found.append((sum(losses), (await step).metrics["grad_norm"]))
    return found


async def trained_tokens(service: lorry.ServiceClient) -> int:
    usage = await service.create_rest_client().get_usage_async()
    return sum(row.tokens for row in usage if row.kind == "train")


def folders(server: Server, training: lorry.TrainingClient) -> list[Path]:
    """What its actors pass to each other."""
    return list((server.data / "checkpoints" / training.model_id).glob("spread/*"))


async def test_a_run_over_three_replicas_learns_as_over_one(server: Server, three: Server) -> None:
    async with lorry.connect(server.address, api_key=server.new_key("over one")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        expected = await curve(training, 4)
        wanted = await training.forward(DATA, "cross_entropy")
    async with lorry.connect(three.address, api_key=three.new_key("over three")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found = await curve(training, 4)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        got = await training.forward(DATA, "cross_entropy")
        for ours, theirs in zip(got.loss_fn_outputs, wanted.loss_fn_outputs, strict=True):
            assert ours["logprobs"].to_numpy() == pytest.approx(theirs["logprobs"].to_numpy(), abs=1e-4)
        assert await trained_tokens(service) == 4 * A_STEP
        assert (three.data / "checkpoints" / training.model_id / "spread").exists(), "it was spread over several"
        await training.optim_step(STEP)
        await until(lambda: not folders(three, training))


async def test_what_is_wrong_with_a_large_pass_is_told_as_of_one_that_is_not_divided(three: Server) -> None:
    async with lorry.connect(three.address, api_key=three.new_key("wrong")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        first = await training.forward(DATA, "cross_entropy")
        wrong = lorry.Datum(lorry.ModelInput.from_ints([10**6] * 4), {"target_tokens": [1] * 4})  # type: ignore[dict-item]
        with pytest.raises(lorry.InvalidRequestError, match=r"data\[7\].model_input is 1000000"):
            await training.forward_backward([*DATA[:7], wrong, *DATA[7:]], "cross_entropy")
        again = await training.forward(DATA, "cross_entropy")
        assert again.metrics["loss:sum"] == pytest.approx(first.metrics["loss:sum"], rel=1e-5)
        assert not (await training.optim_step(STEP)).metrics, "no gradient is pending"


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.long)])
async def test_the_death_of_one_of_three_in_mid_pass_costs_time_alone(three: Server, kills: int) -> None:
    async with lorry.connect(three.address, api_key=three.new_key(f"hurt {kills}")) as service:
        undisturbed = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        expected = await curve(undisturbed, 1 + kills)
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found: list[tuple[float, float]] = []

        async def go_on() -> None:
            found.extend(await curve(training, 1))

        for kill in range(kills):
            await until(lambda: len(actors_of(three)) == 3)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(go_on)
                await until(lambda: bool(folders(three, training)))
                actors_of(three)[kill % 3].kill()
        found += await curve(training, 1)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert await trained_tokens(service) == 2 * (1 + kills) * A_STEP


async def test_a_conversation_goes_on_where_what_was_said_is_known(three: Server) -> None:
    """Six at a time, over three replicas: nothing of an earlier turn is computed again."""
    async with lorry.connect(three.address, api_key=three.new_key("talks")) as service:
        sampler = await service.create_sampling_client_async(base_model=MODEL)
        said = [[(7 * i + j) % 2000 for j in range(96)] for i in range(6)]
        known = 0
        for turn in range(4):
            known += sum((len(prompt) - 1) // 16 * 16 for prompt in said) if turn else 0
            prompts = [prompt + [(turn + i) % 2000 for i in range(64)] for prompt in said]
            params = lorry.SamplingParams(max_tokens=1, temperature=0.0)
            inputs = [lorry.ModelInput.from_ints(prompt) for prompt in prompts]
            answers = [sampler.sample(inputs[i], 1, params) for i in sorted(range(6), key=lambda i: (i + turn) % 6)]
            tokens = [(await answer).sequences[0].tokens for answer in answers]
            said = [[*prompt, *tokens[(i + turn) % 6]] for i, prompt in enumerate(prompts)]
        usage = await service.create_rest_client().get_usage_async()
        assert sum(row.tokens for row in usage if row.kind == "cached_prefill") >= known
