"""Training through client, broker, journal and actor, all real, as a researcher does it."""

from collections.abc import Callable

import anyio
import pytest

import lorry
from tests.conftest import MODEL, Server

Key = Callable[[], str]


def datum(start: int = 10, length: int = 12, **inputs: object) -> lorry.Datum:
    tokens = [(start * 7 + 13 * i) % 2000 for i in range(length + 1)]
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], **inputs})  # type: ignore[dict-item]


async def test_supervised_training_lowers_the_loss(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        losses = []
        for _ in range(8):
            backward = training.forward_backward([datum()], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
            losses.append((await backward).metrics["loss:sum"])
        assert losses[-1] < losses[0] / 2


async def test_a_fresh_adapter_changes_nothing(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        first = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        second = await service.create_lora_training_client_async(MODEL, rank=16, seed=2, train_mlp=False)
        a = await first.forward([datum()], "cross_entropy")
        b = await second.forward([datum()], "cross_entropy")
        assert a.metrics["loss:sum"] == pytest.approx(b.metrics["loss:sum"], rel=1e-5)


async def test_commands_take_effect_in_the_order_of_the_calls_without_waiting(server: Server, new_key: Key) -> None:
    async def losses(wait: bool, service: lorry.ServiceClient) -> list[float]:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=5)
        futures = []
        for _ in range(6):
            futures.append(training.forward_backward([datum()], "cross_entropy"))
            step = training.optim_step(lorry.AdamParams(learning_rate=1e-3))
            if wait:
                await step
        return [(await future).metrics["loss:sum"] for future in futures]

    async with lorry.connect(server.address, api_key=new_key()) as service:
        assert await losses(wait=False, service=service) == pytest.approx(
            await losses(wait=True, service=service), rel=1e-4
        )


async def test_the_acknowledged_form_returns_the_same_future(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        future = await training.forward_backward_async([datum()], "cross_entropy")
        assert (await future).loss_fn_outputs[0]["logprobs"].shape == [12]
        assert await future is await future


async def test_a_custom_loss_has_the_gradient_of_its_built_in_twin(server: Server, new_key: Key) -> None:
    def negative_log_likelihood(data, logprobs):  # noqa: ANN001
        loss = -sum(p.sum() for p in logprobs)
        return loss, {"nll": loss.item()}

    async def norm(service: lorry.ServiceClient, custom: bool) -> float:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=3)
        if custom:
            future = await training.forward_backward_custom_async([datum()], negative_log_likelihood)
            assert (await future).metrics["nll"] > 0
        else:
            training.forward_backward([datum()], "cross_entropy")
        return (await training.optim_step(lorry.AdamParams())).metrics["grad_norm"]

    async with lorry.connect(server.address, api_key=new_key()) as service:
        assert await norm(service, custom=True) == pytest.approx(await norm(service, custom=False), rel=1e-4)


async def test_a_saved_state_resumes_as_if_training_had_never_stopped(server: Server, new_key: Key) -> None:
    async def step(training: lorry.TrainingClient) -> float:
        backward = training.forward_backward([datum()], "cross_entropy")
        await training.optim_step(lorry.AdamParams(learning_rate=1e-3))
        return (await backward).metrics["loss:sum"]

    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        for _ in range(3):
            await step(training)
        saved = await training.save_state("three")
        resumed = await service.create_lora_training_client_async(MODEL, rank=4, seed=99)
        loaded = await resumed.load_state_with_optimizer(saved.path)
        assert loaded.path == saved.path
        restarted = await service.create_lora_training_client_async(MODEL, rank=4, seed=98)
        await restarted.load_state(saved.path)
        went_on = [await step(training) for _ in range(3)]
        assert [await step(resumed) for _ in range(3)] == pytest.approx(went_on, rel=1e-4)
        without_moments = [await step(restarted) for _ in range(3)]
        assert without_moments[0] == pytest.approx(went_on[0], rel=1e-4)
        assert without_moments[2] != pytest.approx(went_on[2], rel=1e-4)


async def test_two_tenants_train_at_once_and_see_nothing_of_each_other(server: Server, new_key: Key) -> None:
    async with (
        lorry.connect(server.address, api_key=new_key()) as alice,
        lorry.connect(server.address, api_key=new_key()) as bob,
    ):
        training = await alice.create_lora_training_client_async(MODEL, rank=4)
        other = await bob.create_lora_training_client_async(MODEL, rank=8, train_unembed=False)
        async with anyio.create_task_group() as tasks:
            for client in (training, other):
                tasks.start_soon(client.forward_backward([datum()], "cross_entropy").result_async)
        saved = await training.save_state("mine")
        weights = await training.save_weights_for_sampler("mine")

        with pytest.raises(lorry.NotFoundError):
            await other.load_state(saved.path)
        with pytest.raises(lorry.NotFoundError):
            await bob.create_sampling_client_async(model_path=weights.path)
        with pytest.raises(lorry.NotFoundError):
            await lorry.TrainingClient(bob._connection, training._run).forward([datum()], "cross_entropy")
        with pytest.raises(lorry.NotFoundError):
            await bob.create_rest_client().delete_checkpoint_from_tinker_path_async(saved.path)
        assert await bob.create_rest_client().list_checkpoints_async() == []
        runs = await bob.create_rest_client().list_training_runs_async()
        assert [run.training_run_id for run in runs] == [other.model_id]
        usage = await bob.create_rest_client().get_usage_async()
        assert {(row.run, row.kind, row.tokens) for row in usage} == {(other.model_id, "train", 12)}


async def test_checkpoints_are_listed_and_deleted_with_their_folders(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        path = (await training.save_weights_for_sampler("one")).path
        rest = service.create_rest_client()
        (checkpoint,) = await rest.list_checkpoints_async(training.model_id)
        (folder,) = (server.data / "checkpoints" / training.model_id / "sampler_weights").iterdir()
        assert (checkpoint.tinker_path, checkpoint.checkpoint_type) == (path, "sampler")
        assert checkpoint.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
        await rest.delete_checkpoint_from_tinker_path_async(path)
        assert await rest.list_checkpoints_async() == []
        assert not folder.exists()


async def test_a_name_that_is_saved_again_means_the_new_weights_and_the_old_folder_stays_for_its_sampler(
    server: Server, new_key: Key
) -> None:
    async def likes(path: str) -> float:
        sampler = await service.create_sampling_client_async(model_path=path)
        logprobs = await sampler.compute_logprobs_async(lorry.ModelInput.from_ints(datum().model_input.to_ints()))
        return sum(logprob for logprob in logprobs if logprob is not None)

    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        before = await likes((await training.save_weights_for_sampler("latest")).path)
        for _ in range(4):
            training.forward_backward([datum()], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
        path = (await training.save_weights_for_sampler("latest")).path
        assert await likes(path) > before + 1
        assert len(await service.create_rest_client().list_checkpoints_async()) == 1
        assert len(list((server.data / "checkpoints" / training.model_id / "sampler_weights").iterdir())) == 2


async def test_usage_is_the_actors_own_count_once_for_each_command(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        await training.forward_backward([datum(length=12), datum(length=30)], "cross_entropy")
        await training.forward([datum(length=7)], "cross_entropy")
        with pytest.raises(lorry.InvalidRequestError):
            await training.forward([datum(length=7, target_tokens=[3000] * 7)], "cross_entropy")
        sampler = await training.save_weights_and_get_sampling_client_async()
        prompt = lorry.ModelInput.from_ints([5, 6, 7])
        await sampler.sample_async(prompt, 4, lorry.SamplingParams(max_tokens=6, stop=[]))
        usage = await service.create_rest_client().get_usage_async()
        counts = {row.kind: row.tokens for row in usage}
        assert {row.run for row in usage} == {training.model_id}
        assert counts == {"train": 42, "prefill": 7 + 3, "sample": 24}


async def test_a_prompt_that_is_found_computed_is_counted_as_that(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        sampler = await training.save_weights_and_get_sampling_client_async()
        prompt = lorry.ModelInput.from_ints(list(range(5, 45)))
        for _ in range(2):
            await sampler.sample_async(prompt, 1, lorry.SamplingParams(max_tokens=1, stop=[]))
        usage = await service.create_rest_client().get_usage_async()
        # Whole blocks of 16 tokens are found.
        assert {row.kind: row.tokens for row in usage} == {"prefill": 40 + 8, "cached_prefill": 32, "sample": 2}


async def test_cancelling_whoever_awaits_leaves_the_command_alone(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        future = training.forward_backward([datum()], "cross_entropy")
        with anyio.move_on_after(0) as scope:
            await future
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError):
            await training.forward([datum()], "cross_entropy").result_async(timeout=0)
        assert (await future).metrics["loss:sum"] > 0
        assert (await training.optim_step(lorry.AdamParams())).metrics["grad_norm"] > 0


async def test_an_error_in_the_block_is_raised_as_it_is_and_ends_what_was_open(server: Server, new_key: Key) -> None:
    with pytest.raises(ZeroDivisionError):
        async with lorry.connect(server.address, api_key=new_key()) as service:
            training = await service.create_lora_training_client_async(MODEL, rank=4)
            open_future = training.forward([datum()] * 8, "cross_entropy")
            raise ZeroDivisionError
    with pytest.raises(lorry.ConnectionLostError):
        await open_future
    with pytest.raises(lorry.ConnectionLostError):
        training.forward([datum()], "cross_entropy")
