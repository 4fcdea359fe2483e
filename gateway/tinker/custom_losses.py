"""Custom losses. What a loss is called by is the loss itself, packed: no table of them is kept, and each command brings
its own."""

import base64
import binascii
import zlib
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends
from tinker.types import CreateCustomLossRequest, UntypedAPIFuture

from ...wire.codec import decode, encode
from ...wire.custom_loss import ENCODED_BYTES_AT_MOST, CustomLoss, check_custom_loss
from ...wire.errors import InvalidRequestError, LorryError
from ...wire.ids import FutureId
from ..bodies import body_of
from ..broker import BrokerOf
from ..request_ids import RequestId

router = APIRouter()

_PREFIX = "loss-"


@router.post("/create_custom_loss")
async def create_custom_loss(
    broker: BrokerOf, body: Annotated[CreateCustomLossRequest, Depends(body_of(CreateCustomLossRequest))]
) -> UntypedAPIFuture:
    told = {
        "name": body.name[:200],
        "inputs": [each.model_dump() for each in body.inputs],
        "nodes": [node.model_dump() for node in body.graph.nodes],
    }
    try:
        loss = msgspec.convert(told, CustomLoss)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"graph: {error}", field="graph") from None
    check_custom_loss(loss)
    return UntypedAPIFuture(request_id=str(RequestId("custom_loss", FutureId(id_of(loss)))))


def id_of(loss: CustomLoss) -> str:
    """Raises InvalidRequestError for one that is too large."""
    encoded = encode(loss)
    if len(encoded) > ENCODED_BYTES_AT_MOST:
        raise InvalidRequestError.of("graph", f"{len(encoded):,} bytes", f"at most {ENCODED_BYTES_AT_MOST:,} bytes")
    return _PREFIX + base64.urlsafe_b64encode(zlib.compress(encoded, 9)).decode()


def loss_of(loss_id: str) -> CustomLoss:
    """Raises InvalidRequestError for what `create_custom_loss` has not answered."""
    shown = loss_id if len(loss_id) <= 40 else f"{loss_id[:40]}…"
    wrong = InvalidRequestError.of("loss_fn_config['loss_id']", shown, "what create_custom_loss answered")
    if not loss_id.startswith(_PREFIX):
        raise wrong
    try:
        unpacking = zlib.decompressobj()
        packed = base64.urlsafe_b64decode(loss_id.removeprefix(_PREFIX))
        encoded = unpacking.decompress(packed, ENCODED_BYTES_AT_MOST)
        if not unpacking.eof:
            raise wrong
        return decode(encoded, CustomLoss)
    except (binascii.Error, ValueError, zlib.error, LorryError):
        raise wrong from None
