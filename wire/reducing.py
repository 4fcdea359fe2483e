"""What metrics of several parts come to together, as the ending of each name says. Pure.

The one rule, for the data of a command, the parts that actors share, and the passes of an optimizer step: the Tinker
SDK's, for what it sends in several requests.
"""

from collections.abc import Iterable, Mapping


def reduced(told: Iterable[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Of metrics, and how many data they are of: `:mean` is over all the data that it was told of, `:sum`, `:min` and
    `:max` are what they say, and of any other name the last one holds."""
    found: dict[str, list[tuple[float, int]]] = {}
    for metrics, data in told:
        for name, value in metrics.items():
            found.setdefault(name, []).append((value, data))
    return {name: _reduced(name, values) for name, values in found.items()}


def _reduced(name: str, told: list[tuple[float, int]]) -> float:
    values = [value for value, _ in told]
    match name.rpartition(":")[2]:
        case "mean":
            data = sum(count for _, count in told)
            return sum(value * count for value, count in told) / data if data else values[-1]
        case "sum":
            return sum(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case _:
            return values[-1]
