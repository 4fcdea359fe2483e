"""Lorry counts Unix seconds; the SDK wants dates."""

from datetime import UTC, datetime

_LAST = datetime(9999, 12, 31, tzinfo=UTC)


def moment(seconds: float) -> datetime:
    """The last day that there is for whatever is later: an older release took any time to live."""
    return datetime.fromtimestamp(seconds, UTC) if seconds < _LAST.timestamp() else _LAST
