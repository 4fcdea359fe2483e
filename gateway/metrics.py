"""What is measured, for Prometheus: the broker's figures and this gateway's own. For keys with `admin` or `metrics`."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ..wire.catalogue_messages import GetMetrics
from .broker import BrokerOf

router = APIRouter()


@router.get("/metrics")
async def metrics(broker: BrokerOf, request: Request) -> Response:
    of_broker = await broker.ask(GetMetrics, str)
    return Response(of_broker + request.app.state.gateway.counts.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
