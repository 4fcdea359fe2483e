"""Amounts as people read them. Pure."""


def size(n: float) -> str:
    """Of `n` bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TiB"


def lasting(seconds: float) -> str:
    """How long something takes, or has taken."""
    seconds = max(0.0, seconds)
    for unit, each in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * each:
            return f"{seconds / each:.0f} {unit}"
    return f"{seconds:.0f} s"
