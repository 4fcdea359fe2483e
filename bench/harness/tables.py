"""What a benchmark prints."""

from collections.abc import Sequence

from rich.table import Table

from .compare import Change
from .figures import Figures, RunFigures, Spread
from .sweep import Point
from .totals import Estimate, Totals

_MOST_TENANTS = 20


def of_run(title: str, run: RunFigures) -> Table:
    columns = ("tenant", "kind", "n", "failed", "n/s", "tokens/s", "p50 s", "p95 s", "p99 s")
    table = Table(*columns, title=title)
    for kind, figures in run.by_kind.items():
        table.add_row("all", kind, *_row(figures))
    if 1 < len(run.by_tenant) <= _MOST_TENANTS:
        for tenant, kinds in run.by_tenant.items():
            for kind, figures in kinds.items():
                table.add_row(tenant, kind, *_row(figures))
    if run.device is not None:
        train, sample = run.device.train, run.device.sample
        table.caption = f"The device trained for {train:.0%} of its time, and sampled for {sample:.0%}."
    return table


def of_estimates(totals: Totals) -> Table:
    table = Table("measure", "mean", "95 % confidence", title=f"{len(totals.runs)} runs")
    for name, estimate in totals.estimates.items():
        table.add_row(name, _number(estimate.mean), _interval(estimate))
    return table


def of_changes(found: Sequence[Change]) -> Table:
    table = Table("measure", "before", "after", "change", "95 % confidence", "")
    for change in found:
        relative = "" if change.relative is None else f"{change.relative:+.1%}"
        bounds = "" if change.low is None or change.high is None else f"{change.low:+.1%} to {change.high:+.1%}"
        row = (change.measure, _number(change.before), _number(change.after), relative, bounds, change.verdict)
        table.add_row(*row)
    return table


def of_sweep(title: str, points: Sequence[Point], knee: Point | None) -> Table:
    table = Table("load", "offered/s", "goodput/s", "tokens/s", "failed", "p99 s", "", title=title)
    for point in points:
        every = point.figures.by_kind.values()
        failed = sum(sum(figures.errors.values()) for figures in every)
        slowest = max((figures.latency_s.p99 for figures in every if figures.latency_s is not None), default=None)
        numbers = (point.offered_per_s, point.goodput_per_s, point.tokens_per_s)
        p99 = "" if slowest is None else _number(slowest)
        note = "the knee" if point is knee else "" if point.is_borne else "too much"
        table.add_row(f"{point.scale:g}", *map(_number, numbers), str(failed), p99, note)
    return table


def _row(figures: Figures) -> list[str]:
    spread: Spread | None = figures.latency_s
    times = ["", "", ""] if spread is None else [_number(value) for value in (spread.p50, spread.p95, spread.p99)]
    rates = [_number(figures.requests_per_s), _number(figures.tokens_per_s)]
    return [str(figures.requests), str(sum(figures.errors.values())), *rates, *times]


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{_number(estimate.low)} to {_number(estimate.high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
