"""Exactly once and in order, whatever the network does: spoken on the bare wire, by a client that misbehaves."""

from collections.abc import Callable

import msgpack
import pytest

import lorry
from lorry.wire.codec import decode, encode
from lorry.wire.commands import ForwardBackwardInput, OptimStepInput
from lorry.wire.types import ForwardBackwardOutput
from tests.conftest import MODEL, Server
from tests.service.raw import Raw
from tests.service.test_training import datum

Key = Callable[[], str]
BACKWARD = encode(ForwardBackwardInput([datum()], "cross_entropy"))
STEP = encode(OptimStepInput(lorry.AdamParams(learning_rate=1e-2)))


@pytest.fixture
def key(new_key: Key) -> str:
    return new_key()


@pytest.fixture
async def run(server: Server, key: str) -> str:
    async with lorry.connect(server.address, api_key=key) as service:
        return (await service.create_lora_training_client_async(MODEL, rank=4, seed=1)).model_id


def submit(run: str, seq: int, kind: str = "forward_backward") -> dict[str, object]:
    return {"type": "submit", "request": seq, "lane": run, "seq": seq, "kind": kind, "tokens": 12}


def loss(frames: list[bytes]) -> float:
    return decode(frames[1], ForwardBackwardOutput).metrics["loss:sum"]


def resolved(raw: Raw, count: int) -> dict[str, list[bytes]]:
    """The next `count` results; answers in between are passed over."""
    found: dict[str, list[bytes]] = {}
    while len(found) < count:
        frames = raw.receive()
        header = msgpack.unpackb(frames[0])
        if header["type"] == "resolved":
            assert header["error"] is None, header
            assert header["future"] not in found, "a result is delivered once"
            found[header["future"]] = frames
    return found


async def test_a_command_that_is_sent_twice_is_executed_and_billed_once(
    server: Server, raw: Raw, key: str, run: str
) -> None:
    raw.hello(key)
    for _ in range(3):
        raw.send(submit(run, 0), BACKWARD)
    first = resolved(raw, 1)
    raw.send(submit(run, 0), BACKWARD)  # once more, after it has finished
    again = resolved(raw, 1)
    assert loss(first[f"{run}:0"]) == loss(again[f"{run}:0"])
    async with lorry.connect(server.address, api_key=key) as service:
        (row,) = await service.create_rest_client().get_usage_async()
        assert (row.kind, row.tokens) == ("train", 12)


async def test_a_late_seq_waits_for_the_gap(server: Server, raw: Raw, key: str, run: str) -> None:
    async with lorry.connect(server.address, api_key=key) as service:
        another = (await service.create_lora_training_client_async(MODEL, rank=4)).model_id
    raw.hello(key)
    raw.send(submit(run, 2), BACKWARD)
    raw.send(submit(run, 1, "optim_step"), STEP)
    assert [raw.receive_header()["request"] for _ in range(2)] == [2, 1], "both are acknowledged"
    raw.send(submit(another, 0), BACKWARD)
    assert set(resolved(raw, 1)) == {f"{another}:0"}, "and neither has run before what came after them"
    raw.send(submit(run, 0), BACKWARD)
    results = resolved(raw, 3)
    assert loss(results[f"{run}:2"]) < loss(results[f"{run}:0"])


def test_a_future_outlives_the_connection_that_asked_for_it(server: Server, raw: Raw, key: str, run: str) -> None:
    raw.hello(key)
    raw.send(submit(run, 0), BACKWARD)
    assert raw.receive_header() == {"type": "answer", "request": 0}
    raw.send({"type": "goodbye"})
    with Raw.connected(server.address) as another:
        another.hello(key)
        another.send({"type": "watch", "futures": [f"{run}:0"]})
        assert loss(resolved(another, 1)[f"{run}:0"]) > 0


@pytest.mark.parametrize("future", ["run-unknown:0", "nonsense", "{run}:7", "{run}:x", ""])
def test_a_future_that_does_not_exist_is_not_found(raw: Raw, key: str, run: str, future: str) -> None:
    raw.hello(key)
    raw.send({"type": "watch", "futures": [future.format(run=run)]})
    assert raw.receive_header()["error"]["code"] == "NotFoundError"


def test_another_tenant_cannot_watch_or_cancel_a_future(
    raw: Raw, key: str, run: str, server: Server, new_key: Key
) -> None:
    raw.hello(key)
    raw.send(submit(run, 1), BACKWARD)
    raw.receive()
    with Raw.connected(server.address) as thief:
        thief.hello(new_key())
        thief.send({"type": "watch", "futures": [f"{run}:1"]})
        assert thief.receive_header()["error"]["code"] == "NotFoundError"
        thief.send({"type": "cancel", "request": 1, "future": f"{run}:1"})
        assert thief.receive_header()["error"]["code"] == "NotFoundError"
    raw.send(submit(run, 0), BACKWARD)
    assert set(resolved(raw, 2)) == {f"{run}:0", f"{run}:1"}


def test_a_command_that_was_cancelled_while_it_waited_is_passed_over(raw: Raw, key: str, run: str) -> None:
    raw.hello(key)
    raw.send(submit(run, 1), BACKWARD)
    raw.receive()
    raw.send({"type": "cancel", "request": 9, "future": f"{run}:1"})
    headers = [raw.receive_header() for _ in range(2)]
    errors = [header["error"]["code"] for header in headers if header["type"] == "resolved"]
    assert errors == ["CommandCancelledError"]
    raw.send(submit(run, 3), BACKWARD)  # and one that is cancelled while it is on its way into the journal
    raw.send({"type": "cancel", "request": 11, "future": f"{run}:3"})
    headers = [raw.receive_header() for _ in range(3)]
    assert [h["error"]["code"] for h in headers if h["type"] == "resolved"] == ["CommandCancelledError"]
    raw.send({"type": "cancel", "request": 10, "future": f"{run}:junk"})
    assert raw.receive_header() == {"type": "answer", "request": 10}
    raw.send(submit(run, 2), BACKWARD)
    raw.send(submit(run, 4), BACKWARD)
    raw.send(submit(run, 0), BACKWARD)
    assert set(resolved(raw, 3)) == {f"{run}:{seq}" for seq in (0, 2, 4)}
