"""A client that does not read its results holds nobody up, and loses none of them."""

from collections.abc import Callable

import numpy as np

import lorry
from lorry.wire.client_messages import SamplerCreated
from lorry.wire.codec import decode, encode
from lorry.wire.commands import SampleInput
from lorry.wire.model_input import ModelInput
from lorry.wire.types import SamplingParams, TensorData
from tests.conftest import MODEL, Server, standing_still
from tests.service.raw import Raw
from tests.service.test_protocol import resolved

REQUESTS = 4
MORE_THAN_BUFFERS = 12 << 20
# Its result is large, and soon computed: how likely each of many tokens was in every place of the prompt.
TARGETS = TensorData.from_numpy(np.tile(np.arange(1000), (999, 1)))
LARGE = encode(
    SampleInput(
        ModelInput.from_ints([7 + i % 900 for i in range(1000)]),
        1,
        SamplingParams(max_tokens=1, stop=[]),
        target_prompt_logprobs=TARGETS,
    )
)


async def test_a_client_that_reads_no_result_holds_nobody_up_and_loses_nothing(
    server: Server, new_key: Callable[[], str]
) -> None:
    key = new_key()
    with (
        Raw.connected(server.address, small_buffers=True) as slow,
        Raw.connected(server.address) as quick,
    ):
        slow.hello(key)
        quick.hello(key)
        quick.send({"type": "create_sampler", "request": 0, "nonce": "n", "base_model": MODEL})
        sampler = decode(quick.receive()[1], SamplerCreated).sampler
        with standing_still(server):
            for i in range(REQUESTS):
                slow.send({"type": "submit", "request": i, "lane": sampler, "seq": i, "kind": "sample"}, LARGE)
            assert [slow.receive_header()["type"] for _ in range(REQUESTS)] == ["answer"] * REQUESTS
        futures = [f"{sampler}:{i}" for i in range(REQUESTS)]
        seen: dict[str, list[bytes]] = {}
        for future in futures:
            slow.send({"type": "ping"})  # alive, but not reading any longer
            quick.send({"type": "watch", "futures": [future]})
            seen |= resolved(quick, 1)
        assert set(seen) == set(futures)
        assert sum(len(frames[1]) for frames in seen.values()) > MORE_THAN_BUFFERS
        async with lorry.connect(server.address, api_key=new_key()) as service:
            other = await service.create_sampling_client_async(base_model=MODEL)
            response = await other.sample_async(ModelInput.from_ints([5, 6]), 1, SamplingParams(max_tokens=2, stop=[]))
            assert len(response.sequences[0].tokens) == 2
        late = resolved(slow, REQUESTS)
        assert {future: frames[1] for future, frames in late.items()} == {f: frames[1] for f, frames in seen.items()}
