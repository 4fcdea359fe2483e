"""Tokens by the hour, as they are billed, and what they cost by the prices of the time."""

from datetime import datetime, timedelta

from fastapi import APIRouter
from tinker.types import BillingUsageResponse
from tinker.types.billing_usage_response import (
    BillingEventInfo,
    BillingUsageEvent,
    BillingUsageSession,
    SamplingPrefillBillingEvent,
    SamplingSampleBillingEvent,
    StorageBillingEvent,
    TrainingBillingEvent,
)

from ...wire.catalogue_messages import UsageBetween
from ...wire.errors import InvalidRequestError
from ...wire.types import ClientSession, UsageEvent
from ..broker import BrokerOf
from .moments import moment

router = APIRouter()

_LONGEST = timedelta(days=14)


@router.get("/billing/usage/events")
async def billing_usage(broker: BrokerOf, starting_on: datetime, ending_before: datetime) -> BillingUsageResponse:
    if not timedelta(0) < ending_before - starting_on <= _LONGEST:
        raise InvalidRequestError.of("ending_before", ending_before.isoformat(), "up to 14 days after starting_on")
    start, end = starting_on.timestamp(), ending_before.timestamp()
    found = await broker.ask(lambda number: UsageBetween(number, start, end), list[UsageEvent])
    known = {session.session_id: session for session in await broker.look("sessions", list[ClientSession])}
    sessions = {
        event.session: BillingUsageSession(user_metadata=known[event.session].user_metadata or None)
        for event in found
        if event.session in known
    }
    return BillingUsageResponse(data=[_event(event) for event in found], sessions=sessions)


def _event(event: UsageEvent) -> BillingUsageEvent:
    return BillingUsageEvent(
        bucket_start=moment(event.hour),
        bucket_end=moment(event.hour + 3600),
        base_model=event.base_model,
        session_id=event.session,
        project_id=event.project,
        estimated_cost_usd=event.cost_usd,
        effective_rate_usd_per_million_tokens=None if event.kind == "storage" else event.usd_per_million,
        event_info=_info(event),
    )


def _info(event: UsageEvent) -> BillingEventInfo:
    match event.kind:
        case "train":
            return TrainingBillingEvent(token_count=event.tokens)
        case "prefill" | "cached_prefill":
            return SamplingPrefillBillingEvent(cached=event.kind == "cached_prefill", token_count=event.tokens)
        case "sample":
            return SamplingSampleBillingEvent(token_count=event.tokens)
        case "storage":
            return StorageBillingEvent(gigabyte_hours=event.gb_hours, free=event.usd_per_million == 0)
