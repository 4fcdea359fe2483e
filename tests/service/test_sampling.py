"""Sampling through client, broker and actor: from the base, from adapters, and what the logprobs mean."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch

import lorry
from tests.actors.models import tiny_qwen3
from tests.conftest import BASE_MODEL, MODEL, Server, start_server
from tests.service.test_training import datum

Key = Callable[[], str]
PROMPT = lorry.ModelInput.from_ints([40, 41, 42, 43])


async def test_the_samplers_logprobs_are_those_of_forward(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=8, seed=1)
        for _ in range(3):
            training.forward_backward([datum()], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
        sampler = await training.save_weights_and_get_sampling_client_async()
        params = lorry.SamplingParams(max_tokens=20, stop=[], seed=3)
        for sample in (await sampler.sample_async(PROMPT, 4, params)).sequences:
            tokens = PROMPT.to_ints() + sample.tokens
            row = lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
            output = await training.forward([row], "cross_entropy")
            logprobs = output.loss_fn_outputs[0]["logprobs"].tolist()[PROMPT.length - 1 :]
            assert logprobs == pytest.approx(sample.logprobs, abs=1e-4)
            scored = await sampler.compute_logprobs_async(lorry.ModelInput.from_ints(tokens))
            assert scored[0] is None
            assert scored[PROMPT.length :] == pytest.approx(sample.logprobs, abs=1e-4)


async def test_the_same_seed_gives_the_same_tokens_whoever_shares_the_batch(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        params = lorry.SamplingParams(max_tokens=12, stop=[], seed=11)
        alone = await base.sample_async(PROMPT, 2, params)
        crowd = [
            base.sample(lorry.ModelInput.from_ints([i, i + 1]), 3, lorry.SamplingParams(max_tokens=9)) for i in range(6)
        ]
        together = await base.sample_async(PROMPT, 2, params)
        assert [s.tokens for s in together.sequences] == [s.tokens for s in alone.sequences]
        assert alone.sequences[0].tokens != alone.sequences[1].tokens
        for future in crowd:
            assert len((await future).sequences) == 3


async def test_prompt_logprobs_and_the_likeliest_tokens_come_on_request(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        params = lorry.SamplingParams(max_tokens=3, stop=[], temperature=0)
        response = await base.sample(
            PROMPT, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=3, topk_sample_logprobs=2
        )
        assert response.prompt_logprobs is not None and response.topk_prompt_logprobs is not None
        assert response.prompt_logprobs[0] is None and len(response.prompt_logprobs) == PROMPT.length
        assert response.topk_prompt_logprobs[0] is None and len(response.topk_prompt_logprobs[1] or []) == 3
        (sequence,) = response.sequences
        assert sequence.topk_logprobs is not None
        for token, logprob, top in zip(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True):
            assert top[0] == (token, pytest.approx(logprob, abs=1e-5)), "greedy takes the likeliest"


async def test_a_prompt_of_the_bare_base_is_found_computed_by_its_own_tenant_alone(
    server: Server, new_key: Key
) -> None:
    prompt = lorry.ModelInput.from_ints(list(range(700, 740)))
    hits: list[int] = []
    for key in (new_key(), new_key()):
        async with lorry.connect(server.address, api_key=key) as service:
            base = await service.create_sampling_client_async(base_model=MODEL)
            for _ in range(2):
                response = await base.sample_async(prompt, 1, lorry.SamplingParams(max_tokens=1, stop=[]))
                hits.append(response.prompt_cache_hit_tokens)
    assert hits == [0, 32, 0, 32]


async def test_a_stop_string_ends_a_sequence(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        tokenizer = await base.get_tokenizer_async()
        prompt = lorry.ModelInput.from_ints(tokenizer.encode("A hacker is someone who"))
        free = (await base.sample_async(prompt, 1, lorry.SamplingParams(max_tokens=30, seed=1, stop=[]))).sequences[0]
        text = tokenizer.decode(free.tokens)
        needle = text[10:13]
        params = lorry.SamplingParams(max_tokens=30, seed=1, stop=[needle])
        stopped = (await base.sample_async(prompt, 1, params)).sequences[0]
        assert stopped.stop_reason == "stop"
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]
        assert needle in tokenizer.decode(stopped.tokens)
        assert needle not in tokenizer.decode(stopped.tokens[:-1])


async def test_a_cancelled_sample_is_gone_and_others_go_on(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        long = base.sample(PROMPT, 8, lorry.SamplingParams(max_tokens=4000, stop=[]))
        short = base.sample(PROMPT, 1, lorry.SamplingParams(max_tokens=5, stop=[]))
        assert len((await short).sequences[0].tokens) == 5
        await long.cancel()
        with pytest.raises(lorry.CommandCancelledError):
            await long


@pytest.mark.long
async def test_an_actor_whose_steps_are_compiled_samples_the_models_tokens(tmp_path: Path) -> None:
    """A model of two layers: compiling takes its time for each."""
    model, prompt = tiny_qwen3(), torch.tensor([PROMPT.to_ints()])
    model.save_pretrained(copytree(BASE_MODEL, tmp_path / "model"))  # over another model, whose tokenizer stays
    expected = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)[0, PROMPT.length :]
    server = start_server(tmp_path / "data", "--compile", model=f"{MODEL}={tmp_path / 'model'}")
    try:
        async with lorry.connect(server.address, api_key=server.new_key("alice")) as service:
            base = await service.create_sampling_client_async(base_model=MODEL)
            params = lorry.SamplingParams(max_tokens=16, stop=[], temperature=0)
            response = await base.sample_async(PROMPT, 2, params)
        assert [sequence.tokens for sequence in response.sequences] == [expected.tolist()] * 2
    finally:
        server.stop()
