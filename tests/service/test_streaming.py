"""Tokens as they are made, through client, broker and actor, whichever of them dies meanwhile."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

import lorry
from tests.conftest import MODEL, Server, children_of, start_server

Key = Callable[[], str]
PROMPT = lorry.ModelInput.from_ints([40, 41, 42, 43])
LONG = lorry.SamplingParams(max_tokens=200, stop=[], seed=3)
ENDLESS = lorry.SamplingParams(max_tokens=4000, stop=[])


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("fragile"))
    yield server
    server.stop()


def by_sample(tokens: list[lorry.StreamedToken], samples: int) -> list[list[int]]:
    return [[token.token for token in tokens if token.sample == sample] for sample in range(samples)]


async def test_tokens_are_read_before_the_sample_is_over(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        expected = await base.sample_async(PROMPT, 2, LONG, topk_sample_logprobs=2)
        stream, read = base.stream(PROMPT, LONG, num_samples=2, topk_sample_logprobs=2), list[lorry.StreamedToken]()
        async for token in stream:
            if not read:
                assert not stream.done()
            read.append(token)
        assert by_sample(read, 2) == [sequence.tokens for sequence in expected.sequences]
        assert [t.stop_reason for t in read if t.stop_reason] == ["length", "length"]
        assert all(token.topk_logprobs and len(token.topk_logprobs) == 2 for token in read)
        whole = await stream
        assert [s.tokens for s in whole.sequences] == by_sample(read, 2)
        assert [t.logprob for t in read if t.sample == 1] == whole.sequences[1].logprobs


@pytest.mark.parametrize("victim", ["actor", "broker"])
async def test_a_death_costs_time_and_no_token(fragile: Server, victim: str) -> None:
    async with lorry.connect(fragile.address, api_key=fragile.new_key(f"hurt by its {victim}")) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        expected = await base.sample_async(PROMPT, 2, LONG)
        read: list[lorry.StreamedToken] = []
        async for token in base.stream(PROMPT, LONG, num_samples=2):
            read.append(token)
            if len(read) == 20:
                os.kill(children_of(fragile.process.pid)[victim], signal.SIGKILL)
        assert by_sample(read, 2) == [sequence.tokens for sequence in expected.sequences]


async def test_who_leaves_the_block_ends_the_sample(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        async with base.stream(PROMPT, ENDLESS, num_samples=4) as stream:
            async for _ in stream:
                break
        with pytest.raises(lorry.CommandCancelledError):
            await stream
        async with base.stream(PROMPT, lorry.SamplingParams(max_tokens=3, stop=[])) as stream:
            assert len([token async for token in stream]) == 3
        assert len((await stream).sequences[0].tokens) == 3


async def test_what_is_wrong_is_raised_where_tokens_are_read(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        beyond = lorry.ModelInput.from_ints([10**9])
        with pytest.raises(lorry.InvalidRequestError, match="1000000000"):
            async for _ in base.stream(beyond, LONG):
                pass
        with pytest.raises(lorry.DeadlineExceededError), lorry.deadline(0.5):
            async for _ in base.stream(PROMPT, ENDLESS, num_samples=4):
                pass
        assert len([token async for token in base.stream(PROMPT, lorry.SamplingParams(max_tokens=2, stop=[]))]) == 2
