"""Lorry counts Unix seconds; the SDK wants dates."""

from datetime import UTC, datetime


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
