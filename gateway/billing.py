"""Tokens by the hour, as they are billed. Lorry keeps no prices yet: costs are left out."""

from datetime import datetime, timedelta

from fastapi import APIRouter
from tinker.types import BillingUsageResponse
from tinker.types.billing_usage_response import (
    BillingEventInfo,
    BillingUsageEvent,
    SamplingPrefillBillingEvent,
    SamplingSampleBillingEvent,
    TrainingBillingEvent,
)

from ..wire.client_messages import UsageBetween
from ..wire.errors import InvalidRequestError
from ..wire.types import UsageEvent
from .broker import BrokerOf
from .moments import moment
from .sessions import PROJECT

router = APIRouter()

_LONGEST = timedelta(days=14)


@router.get("/billing/usage/events")
async def billing_usage(broker: BrokerOf, starting_on: datetime, ending_before: datetime) -> BillingUsageResponse:
    if not timedelta(0) < ending_before - starting_on <= _LONGEST:
        raise InvalidRequestError.of("ending_before", ending_before.isoformat(), "up to 14 days after starting_on")
    start, end = starting_on.timestamp(), ending_before.timestamp()
    found = await broker.ask(lambda number: UsageBetween(number, start, end), list[UsageEvent])
    return BillingUsageResponse(data=[_event(event) for event in found])


def _event(event: UsageEvent) -> BillingUsageEvent:
    return BillingUsageEvent(
        bucket_start=moment(event.hour),
        bucket_end=moment(event.hour + 3600),
        base_model=event.base_model,
        session_id=event.session,
        project_id=PROJECT,
        event_info=_info(event),
    )


def _info(event: UsageEvent) -> BillingEventInfo:
    match event.kind:
        case "train":
            return TrainingBillingEvent(token_count=event.tokens)
        case "prefill":
            return SamplingPrefillBillingEvent(cached=False, token_count=event.tokens)
        case "sample":
            return SamplingSampleBillingEvent(token_count=event.tokens)
