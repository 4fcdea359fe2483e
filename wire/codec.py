"""MessagePack in, declared types out. Nothing is unpickled or evaluated; sizes are checked before anything is decoded.

Tensors travel as raw little-endian bytes with a dtype and a shape, so a broker can pass them on without a look.
"""

import math
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, overload

import msgpack
import msgspec
import numpy as np

from .errors import InvalidRequestError, MessageTooLargeError, ProtocolError
from .types import TensorData

T = TypeVar("T")

MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024

_WIRE_DTYPES = {"int64": np.dtype("<i8"), "float32": np.dtype("<f4")}


class _WireTensor(msgspec.Struct, frozen=True):
    dtype: Literal["int64", "float32"]
    shape: list[int]
    data: bytes


def _to_wire(value: object) -> object:
    if isinstance(value, TensorData):
        array = value.to_numpy().astype(_WIRE_DTYPES[value.dtype], copy=False)
        return {"dtype": value.dtype, "shape": value.shape, "data": array.tobytes()}
    raise TypeError(f"{type(value).__name__} does not travel")


def _from_wire(kind: type, value: object) -> object:
    if kind is not TensorData:
        raise TypeError(f"{kind.__name__} does not travel")
    tensor = msgspec.convert(value, _WireTensor)
    dtype = _WIRE_DTYPES[tensor.dtype]
    if any(n < 0 for n in tensor.shape) or math.prod(tensor.shape) * dtype.itemsize != len(tensor.data):
        raise ValueError(f"{len(tensor.data)} bytes do not fill shape {tensor.shape} of {tensor.dtype}")
    return TensorData(np.frombuffer(tensor.data, dtype), tensor.dtype, tensor.shape)


def encode(message: object) -> bytes:
    """Any declared type to MessagePack; the same value is always the same bytes.

    Raises InvalidRequestError for a number that has no place in 64 bits.
    """
    try:
        plain = msgspec.to_builtins(message, builtin_types=(bytes,), enc_hook=_to_wire, order="deterministic")
        return cast(bytes, msgpack.packb(plain))
    except OverflowError:
        raise InvalidRequestError("a number in it is beyond 64 bits") from None


@overload
def decode(data: bytes, kind: type[T], limit: int = MAX_PAYLOAD_BYTES) -> T: ...
@overload
def decode(data: bytes, kind: UnionType, limit: int = MAX_PAYLOAD_BYTES) -> Any: ...
def decode(data: bytes, kind: Any, limit: int = MAX_PAYLOAD_BYTES) -> Any:
    """MessagePack to the declared type `kind` (a struct, or a union of tagged structs).

    Raises MessageTooLargeError above `limit` bytes, ProtocolError where `data` is not MessagePack, InvalidRequestError
    (with the field's path) where it is something other than `kind`.
    """
    if len(data) > limit:
        raise MessageTooLargeError(f"the message has {len(data):,} bytes, the limit is {limit:,}")
    try:
        plain: Any = msgpack.unpackb(data)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"{len(data)} bytes are not MessagePack ({type(error).__name__}: {error})") from None
    try:
        return msgspec.convert(plain, _member(kind, plain), dec_hook=_from_wire)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `")
        field = path.rstrip("`").removeprefix("$.").removeprefix("$") or "message"
        raise InvalidRequestError(f"{field}: {problem}", field=field) from None


def _member(kind: Any, plain: object) -> Any:
    """Which of a union's structs it says that it is: msgspec learns a union anew in each conversion, which takes longer
    than all the rest. One that it is not, or that nobody knows, is for msgspec to refuse."""
    if isinstance(kind, UnionType) and isinstance(plain, dict):
        named = cast("dict[object, object]", plain).get("type")
        return _members(kind).get(named, kind) if isinstance(named, str) else kind
    return kind


@cache
def _members(union: UnionType) -> dict[str | int | None, Any]:
    structs = (kind for kind in get_args(union) if isinstance(kind, type) and issubclass(kind, msgspec.Struct))
    return {struct.__struct_config__.tag: struct for struct in structs}
