"""What arrives is what was sent, or a typed error that says what is wrong; never anything else."""

import contextlib
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lorry.wire.client_messages import FromClient, Submit
from lorry.wire.codec import decode, encode
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.errors import (
    ErrorInfo,
    InvalidRequestError,
    LorryError,
    MessageTooLargeError,
    NonFiniteError,
    ProtocolError,
    revive,
)
from lorry.wire.ids import LaneId
from lorry.wire.model_input import ModelInput
from lorry.wire.types import Datum, SampledSequence, SampleResponse, TensorData

SHAPES = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@given(st.one_of(arrays(np.float32, SHAPES), arrays(np.int64, SHAPES)))
def test_a_tensor_arrives_bit_for_bit(array: np.ndarray) -> None:
    arrived = decode(encode(TensorData(array)), TensorData)
    assert arrived.shape == list(array.shape)
    assert arrived.to_numpy().dtype == array.dtype
    assert arrived.to_numpy().tobytes() == array.tobytes()


def test_a_request_and_a_result_arrive_as_they_were() -> None:
    request = ForwardBackwardInput([Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})], "ppo", {"x": 1.0})  # type: ignore[dict-item]
    assert decode(encode(request), ForwardBackwardInput) == request
    result = SampleResponse([SampledSequence("stop", [1, 2], [-0.5, -1.0], [[(1, -0.5)], [(2, -1.0)]])], [None, -2.0])
    assert decode(encode(result), SampleResponse) == result


@given(st.binary(max_size=200))
def test_any_bytes_decode_to_a_message_or_a_typed_error(data: bytes) -> None:
    for kind in (FromClient, ForwardBackwardInput):
        with contextlib.suppress(ProtocolError, InvalidRequestError):
            decode(data, kind)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_structure_decodes_to_a_message_or_a_typed_error(value: object) -> None:
    try:
        data = msgpack.packb(value)
    except OverflowError:
        return
    with pytest.raises(InvalidRequestError):
        decode(data, FromClient)


FIELDS = sorted({name for member in get_args(FromClient) for name in member.__struct_fields__})
SAID = st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["run-1", "optim_step"]) | st.lists(st.text())


@given(
    st.sampled_from([member.__struct_config__.tag for member in get_args(FromClient)]) | SAID,
    st.dictionaries(st.sampled_from(FIELDS), SAID, max_size=6),
)
def test_a_message_is_whichever_of_the_union_it_says_that_it_is(tag: object, said: dict[str, object]) -> None:
    plain = {"type": tag, **said}
    try:
        expected: Any = msgspec.convert(plain, FromClient)
    except msgspec.ValidationError as error:
        with pytest.raises(InvalidRequestError) as caught:
            decode(msgpack.packb(plain), FromClient)
        assert str(error).partition(" - at `")[0] in str(caught.value)
    else:
        assert decode(msgpack.packb(plain), FromClient) == expected


@pytest.mark.parametrize(
    ("shape", "data"), [([2], b"1234"), ([-1], b""), ([1 << 40, 1 << 40], b""), ([3], bytes(11)), ([], b"")]
)
def test_a_tensor_whose_bytes_do_not_fill_its_shape_is_refused(shape: list[int], data: bytes) -> None:
    wire = msgpack.packb({"dtype": "float32", "shape": shape, "data": data})
    with pytest.raises(InvalidRequestError, match="do not fill"):
        decode(wire, TensorData)


def test_the_size_is_checked_before_anything_is_decoded() -> None:
    with pytest.raises(MessageTooLargeError, match="101 bytes, the limit is 100"):
        decode(b"\xc1" * 101, Submit, limit=100)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(b"\x91" * 100_000 + b"\x90", Submit)


def test_a_wrong_field_is_named_by_its_path() -> None:
    wire = msgpack.packb({"data": [{"model_input": {"chunks": [{"tokens": [1, "two"]}]}}], "loss_fn": "ppo"})
    with pytest.raises(InvalidRequestError) as caught:
        decode(wire, ForwardBackwardInput)
    assert caught.value.field == "data[0].model_input.chunks[0].tokens[1]"


def test_an_error_is_of_the_same_class_and_words_at_the_other_end() -> None:
    sent = NonFiniteError("data[3] has a loss of nan", field="data")
    arrived = revive(decode(encode(sent.info), ErrorInfo))
    assert type(arrived) is NonFiniteError
    assert (str(arrived), arrived.field) == (str(sent), "data")


def test_an_error_of_a_newer_peer_is_still_a_lorry_error() -> None:
    assert type(revive(ErrorInfo("QuantumError", "it is both"))) is LorryError


def test_headers_stay_small() -> None:
    submit = Submit(request=1, lane=LaneId("run-0123456789abcdef"), seq=7, kind="forward_backward", tokens=1024, rows=8)
    assert len(encode(submit)) < 150
