"""A curve: what was found at each of its points, as a table, a line of JSON, and a plot."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

Spread: TypeAlias = tuple[float, float, float]
"""Median, lower and upper quartile."""


@dataclass(frozen=True, slots=True)
class Point:
    """`found` by column: one number, or several with their spread."""

    at: int
    found: Mapping[str, float | Spread]


@dataclass(frozen=True, slots=True)
class Curve:
    """`measure` makes the points one after the other, `at` those that it is given, in rising order."""

    title: str
    what: str
    at: Sequence[int]
    measure: Callable[[Sequence[int]], Iterable[Point]]


def spread(values: Sequence[float]) -> Spread:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def table_of(curve: Curve, points: Sequence[Point]) -> Table:
    table = Table(curve.what, *points[0].found, title=curve.title)
    for point in points:
        table.add_row(f"{point.at:,}", *(_told(value) for value in point.found.values()))
    return table


def json_of(name: str, points: Sequence[Point]) -> str:
    return json.dumps({"curve": name, "points": [{"at": point.at, **point.found} for point in points]})


def write_page(file: Path, curve: Curve, points: Sequence[Point]) -> None:
    """One file that fetches nothing, with a plot for each column."""
    columns = list(points[0].found)
    figure = make_subplots(len(columns), 1, subplot_titles=columns, vertical_spacing=0.3 / len(columns))
    for row, column in enumerate(columns, 1):
        spreads = [_spread_of(point.found[column]) for point in points]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [high - middle for middle, _, high in spreads],
            "arrayminus": [middle - low for middle, low, _ in spreads],
        }
        middles = [middle for middle, _, _ in spreads]
        line = go.Scatter(x=[point.at for point in points], y=middles, error_y=bars, name=column, showlegend=False)
        figure.add_trace(line, row=row, col=1)
        figure.update_xaxes(title_text=curve.what, type="log", row=row, col=1)
        figure.update_yaxes(rangemode="tozero", row=row, col=1)
    figure.update_layout(title=curve.title, height=320 * len(columns))
    figure.write_html(file, include_plotlyjs=True)


def _spread_of(value: float | Spread) -> Spread:
    return value if isinstance(value, tuple) else (value, value, value)


def _told(value: float | Spread) -> str:
    if isinstance(value, tuple):
        middle, low, high = (_number(each) for each in value)
        return f"{middle} ({low} to {high})"
    return _number(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
