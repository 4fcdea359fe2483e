"""forward_backward's request: the SDK's protobuf message to Lorry's words. It touches no socket and no clock."""

from collections.abc import Iterable
from typing import cast

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as public_pb

from ...wire.codec import encode
from ...wire.commands import ForwardBackwardInput, check_forward_backward, planned_length
from ...wire.custom_loss import CustomLoss
from ...wire.errors import InvalidRequestError
from ...wire.model_input import Chunk, EncodedTextChunk, ImageChunk, ImageFormat, ModelInput
from ...wire.types import Datum, TensorData
from ..errors import MalformedBodyError, NotSupportedError
from .custom_losses import loss_of
from .ordered import Wanted
from .tensors import check_shape, fill, unfold

_DTYPES: dict[int, np.dtype[np.generic]] = {
    public_pb.DTYPE_FLOAT32: np.dtype("<f4"),
    public_pb.DTYPE_INT64: np.dtype("<i8"),
    public_pb.DTYPE_INT32: np.dtype("<i4"),
    public_pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}


def read_pass(body: bytes) -> Wanted:
    """A forward or forward_backward, checked and encoded for the broker.

    Raises MalformedBodyError, NotSupportedError, InvalidRequestError.
    """
    message = public_pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise MalformedBodyError(f"the body is no ForwardBackwardRequest ({error})") from None
    data = [
        Datum(
            _model_input(f"data[{i}].model_input", datum.model_input),
            {name: _tensor(f"data[{i}].loss_fn_inputs[{name!r}]", t) for name, t in datum.loss_fn_inputs.items()},
        )
        for i, datum in enumerate(message.data)
    ]
    if message.loss_fn == "custom":
        request = ForwardBackwardInput(data, "custom", custom=_custom(message))
    else:
        request = ForwardBackwardInput(data, message.loss_fn, _config(message))
    check_forward_backward(request)
    tokens = sum(planned_length(datum.model_input) for datum in data)
    return Wanted(
        message.model_id,
        message.seq_id,
        encode(request),
        tokens,
        len(data),
        kind="forward" if message.forward_only else "forward_backward",
    )


def _custom(message: public_pb.ForwardBackwardRequest) -> CustomLoss:
    config = {key: value.text for key, value in message.loss_fn_config_v2.items()}
    if set(config) != {"loss_id"}:
        raise InvalidRequestError.of("loss_fn_config", sorted(config), "loss_id, for a custom loss, and nothing else")
    return loss_of(config["loss_id"])


def _config(message: public_pb.ForwardBackwardRequest) -> dict[str, float]:
    """Newer SDKs send every value in the second map, and the numbers in the first as well."""
    config = {key: float(value) for key, value in message.loss_fn_config.items()}
    for key, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise InvalidRequestError.of(f"loss_fn_config[{key!r}]", value.text, "a number")
        config[key] = value.number
    return config


def _model_input(name: str, chunks: Iterable[public_pb.Chunk]) -> ModelInput:
    read: list[Chunk] = []
    for i, chunk in enumerate(chunks):
        match kind := chunk.WhichOneof("chunk"):
            case "encoded_text":
                read.append(EncodedTextChunk(_array(name, chunk.encoded_text.tokens, np.dtype("<i4")).tolist()))
            case "image":
                read.append(_image(f"{name}.chunks[{i}]", chunk.image))
            case _:
                raise NotSupportedError(
                    f"{name}.chunks[{i}] is {kind or 'of no known type'}, expected text or an image"
                )
    return ModelInput(read)


def _image(name: str, image: public_pb.ImageChunk) -> ImageChunk:
    """Its format is checked with the rest of the request."""
    if image.HasField("override_dimensions"):
        raise NotSupportedError(f"{name}.override_dimensions: send the image in the size that the model is to see")
    expected = image.expected_tokens if image.HasField("expected_tokens") else None
    return ImageChunk(image.data, cast("ImageFormat", image.format), expected)


def _tensor(name: str, tensor: public_pb.Tensor) -> TensorData:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise MalformedBodyError(f"{name}.dtype is {tensor.dtype}, which no tensor has")
    shape = check_shape(name, tensor.shape)
    if tensor.HasField("sparse_csr"):
        csr, index = tensor.sparse_csr, np.dtype("<i8")
        starts, columns = (_array(name, data, index) for data in (csr.crow_indices, csr.col_indices))
        array = unfold(name, _array(name, csr.values, dtype), starts, columns, shape)
    else:
        array = _array(name, tensor.dense, dtype)
        array = fill(name, array, shape) if shape else array
    if tensor.dtype == public_pb.DTYPE_BFLOAT16:
        array = (array.astype("<u4") << 16).view("<f4")
    return TensorData(array)


def _array(name: str, data: bytes, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    if len(data) % dtype.itemsize:
        raise MalformedBodyError(f"{name} has {len(data)} bytes, which are no whole number of {dtype.name}")
    return np.frombuffer(data, dtype)
