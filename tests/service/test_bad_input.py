"""Whatever is wrong gets a typed, readable error at the caller, and everyone else's work goes on."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgpack
import pytest

import lorry
from lorry.wire.client_messages import VERSION
from lorry.wire.codec import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, encode
from lorry.wire.commands import ForwardBackwardInput
from tests.conftest import MODEL, Server
from tests.service.raw import Raw
from tests.service.test_training import datum

Key = Callable[[], str]


@contextmanager
def refusal(kind: type[lorry.LorryError], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


async def test_an_unknown_model_names_those_that_are_served(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        with refusal(lorry.UnknownModelError, "'gpt-9'", MODEL):
            await service.create_lora_training_client_async("gpt-9", rank=4)
        with refusal(lorry.UnknownModelError, "'gpt-9'", MODEL):
            await service.create_sampling_client_async(base_model="gpt-9")


async def test_a_wrong_key_is_refused_at_hello(server: Server) -> None:
    with refusal(lorry.AuthenticationError, "tml-wron", "lorry keys create"):
        async with lorry.connect(server.address, api_key="tml-wrong-and-secret"):
            pytest.fail("connected with a wrong key")


async def test_a_broken_command_after_a_restart_is_sent_again_and_does_not_stop_its_run(server: Server) -> None:
    command = {"type": "submit", "request": 1, "lane": "run", "seq": 0, "kind": "optim_step", "tokens": -1}
    with Raw.connected(server.address) as raw:
        assert raw.ask(command)["type"] == "unknown"


async def test_nobody_at_the_address_is_a_connection_error() -> None:
    with refusal(lorry.ConnectionLostError, "tcp://127.0.0.1:9", "lorry serve"):
        async with lorry.connect("tcp://127.0.0.1:9", api_key="tml-x", timeout_s=0.5):
            pytest.fail("connected to nobody")


@pytest.mark.parametrize(
    ("rank", "words"), [(-1, ("rank", "-1")), (0, ("rank", "0")), (100_000, ("rank", "100000", "256"))]
)
async def test_a_rank_out_of_range_names_the_range(
    server: Server, new_key: Key, rank: int, words: Sequence[str]
) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        with refusal(lorry.InvalidRequestError, *words):
            await service.create_lora_training_client_async(MODEL, rank=rank)


BAD_DATA = {
    "empty data": ([], "cross_entropy", "data"),
    "empty sequence": ([lorry.Datum(lorry.ModelInput.empty(), {"target_tokens": []})], "cross_entropy", "model_input"),
    "negative token": ([datum(target_tokens=[-1] * 12)], "cross_entropy", "target_tokens"),
    "target length": ([datum(), datum(target_tokens=[1] * 11)], "cross_entropy", "data[1]"),
    "weights length": ([datum(weights=[1.0] * 5)], "cross_entropy", "weights"),
    "NaN weights": ([datum(weights=[float("nan")] * 12)], "cross_entropy", "nan"),
    "unknown loss": ([datum()], "hinge", "hinge"),
    "unknown input": ([datum(rewards=[1.0] * 12)], "cross_entropy", "rewards"),
    "missing input": ([datum()], "ppo", "advantages"),
    "empty ratio mask": (
        [datum(logprobs=[-1.0] * 12, advantages=[1.0] * 12, sequence_ratio_mask=[0.0] * 12)],
        "gspo",
        "sequence_ratio_mask",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
async def test_bad_data_is_refused_where_it_was_made(server: Server, new_key: Key, case: str) -> None:
    data, loss, word = BAD_DATA[case]
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        with refusal(lorry.InvalidRequestError, word):
            training.forward_backward(data, loss)
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


@pytest.mark.parametrize("case", BAD_DATA)
async def test_the_actor_refuses_the_same_from_a_client_that_checks_nothing(
    server: Server, new_key: Key, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, loss, word = BAD_DATA[case]
    monkeypatch.setattr("lorry.client.training.check_forward_backward", lambda request: None)
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        with refusal(lorry.InvalidRequestError, word):
            await training.forward_backward(data, loss)
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_a_token_outside_the_vocabulary_fails_alone(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        bad = await service.create_lora_training_client_async(MODEL, rank=4)
        good = await service.create_lora_training_client_async(MODEL, rank=4)
        futures = [good.forward_backward([datum()], "cross_entropy") for _ in range(3)]
        poisoned = bad.forward_backward([datum(target_tokens=[5000] * 12)], "cross_entropy")
        futures += [good.forward_backward([datum()], "cross_entropy") for _ in range(3)]
        with refusal(lorry.InvalidRequestError, "5000", "2048"):
            await poisoned
        losses = [(await future).metrics["loss:sum"] for future in futures]
        assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)


async def test_a_loss_that_overflows_fails_alone_and_leaves_the_weights(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        before = (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"]
        inputs = {"logprobs": [-1e30] * 12, "advantages": [1.0] * 12}
        with refusal(lorry.NonFiniteError, "data[0]"):
            await training.forward_backward([datum(**inputs)], "importance_sampling")
        await training.optim_step(lorry.AdamParams(learning_rate=1.0))
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] == pytest.approx(
            before, rel=1e-6
        )


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a/b", ".hidden", "x" * 200])
async def test_a_checkpoint_name_is_never_a_path(server: Server, new_key: Key, name: str) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        with refusal(lorry.InvalidRequestError, "name"):
            await training.save_state(name)


async def test_a_checkpoint_of_another_shape_names_the_difference(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        small = await service.create_lora_training_client_async(MODEL, rank=4)
        path = (await small.save_state("small")).path
        large = await service.create_lora_training_client_async(MODEL, rank=8)
        with refusal(lorry.InvalidRequestError, "rank 8", "4"):
            await large.load_state(path)
        with refusal(lorry.NotFoundError, "tinker://nowhere"):
            await large.load_state("tinker://nowhere/weights/x")


@pytest.mark.parametrize(
    ("params", "word"),
    [
        (lorry.SamplingParams(temperature=-1), "temperature"),
        (lorry.SamplingParams(top_p=0), "top_p"),
        (lorry.SamplingParams(top_k=0), "top_k"),
        (lorry.SamplingParams(max_tokens=0), "max_tokens"),
        (lorry.SamplingParams(stop=[""]), "stop"),
        (lorry.SamplingParams(max_tokens=100_000), "4096"),
    ],
)
async def test_bad_sampling_parameters_are_named(
    server: Server, new_key: Key, params: lorry.SamplingParams, word: str
) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        with refusal(lorry.InvalidRequestError, word):
            await base.sample(lorry.ModelInput.from_ints([1, 2]), 1, params)


async def test_a_request_above_the_limit_is_refused_before_it_is_sent(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        tokens = [7] * 100_000
        row = lorry.Datum(lorry.ModelInput.from_ints(tokens), {"target_tokens": tokens, "weights": [1.0] * len(tokens)})
        with refusal(lorry.MessageTooLargeError, "67,108,864"):
            training.forward_backward([row] * 60, "cross_entropy")
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_arguments_of_a_wrong_type_or_size_are_refused_where_they_were_made(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        other = training.forward([datum()], "cross_entropy")
        with refusal(lorry.InvalidRequestError, "name"):
            training.save_state(5)  # type: ignore[arg-type]
        with refusal(lorry.MessageTooLargeError, "65,536"):
            training.save_state("x", user_metadata={"note": "x" * MAX_HEADER_BYTES})
        assert (await other).metrics["loss:sum"] > 0
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_two_clients_that_drive_one_run_learn_it_at_their_first_collision(server: Server, new_key: Key) -> None:
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        twin = copy.copy(training)
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0
        with refusal(lorry.SeqConflictError, "request 0", "optim_step", "forward", "another client"):
            await twin.optim_step(lorry.AdamParams())
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_an_oversized_payload_is_refused_by_the_broker_too(server: Server, raw: Raw, new_key: Key) -> None:
    key = new_key()
    raw.hello(key)
    async with lorry.connect(server.address, api_key=key) as service:
        run = (await service.create_lora_training_client_async(MODEL, rank=4)).model_id
    submit = {"type": "submit", "request": 3, "lane": run, "seq": 0, "kind": "forward"}
    assert raw.ask(submit, bytes(MAX_PAYLOAD_BYTES + 1)) == {"type": "answer", "request": 3}
    assert raw.receive_header()["error"]["code"] == "MessageTooLargeError"
    assert raw.ask({"type": "ping"})["type"] == "pong"


def test_an_oversized_header_is_refused(raw: Raw, new_key: Key) -> None:
    raw.hello(new_key())
    answer = raw.ask(b"x" * (MAX_HEADER_BYTES + 1))
    assert answer["error"]["code"] == "MessageTooLargeError"


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"\xff\xff", b"not msgpack", msgpack.packb([1, 2]), msgpack.packb({"type": "nonsense"})]
)
def test_wrong_messagepack_is_answered_with_a_typed_error(raw: Raw, new_key: Key, junk: bytes) -> None:
    raw.hello(new_key())
    answer = raw.ask(junk)
    assert answer["type"] == "failed"
    assert answer["error"]["code"] in ("ProtocolError", "InvalidRequestError")
    assert raw.ask({"type": "ping"})["type"] == "pong"


def test_a_field_of_the_wrong_type_is_named(raw: Raw, new_key: Key) -> None:
    raw.hello(new_key())
    answer = raw.ask({"type": "submit", "request": "one", "lane": "x", "seq": 0, "kind": "forward"})
    assert answer["error"]["field"] == "request"


def test_another_version_is_told_both_versions(raw: Raw, new_key: Key) -> None:
    message = raw.hello(new_key(), version=99)["error"]["message"]
    assert "99" in message and str(VERSION) in message


def test_a_connection_without_hello_is_told_to_say_it(raw: Raw) -> None:
    assert raw.ask({"type": "ping"})["type"] == "unknown"


async def test_a_payload_that_is_no_messagepack_fails_its_command_alone(server: Server, new_key: Key, raw: Raw) -> None:
    key = new_key()
    async with lorry.connect(server.address, api_key=key) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        raw.hello(key)
        submit = {"type": "submit", "lane": training.model_id, "kind": "forward"}
        for seq, payload in enumerate(
            (b"\xc1junk", encode({"data": 3}), encode(ForwardBackwardInput([datum()], "cross_entropy")))
        ):
            answer = raw.ask(submit | {"request": seq, "seq": seq}, payload)
            assert answer == {"type": "answer", "request": seq}
            resolved = raw.receive_header()
            code = resolved["error"]["code"] if resolved["error"] else None
            assert code == ("ProtocolError", "InvalidRequestError", None)[seq]
