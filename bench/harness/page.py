"""One page that needs nothing else: what happened in a run, in plots."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.subplots import make_subplots

from .device import Reading, Split, splits_of
from .figures import Figures
from .records import Record
from .totals import Totals

_BINS = 60
_COLOURS = {"train": "#4c6ef5", "sample": "#f08c00"}
_PLOTS = (
    ("Throughput", "seconds", "tokens/s"),
    ("Under way", "seconds", "requests"),
    ("Latency, from when a request was due", "seconds", "% of requests"),
    ("Latency by tenant: median, and 99th percentile (pale)", "", "seconds"),
    ("Throughput by tenant", "", "tokens/s"),
    ("Errors", "", "requests"),
    ("What the device did", "seconds", "% of its time"),
    ("Time to the first token, and between tokens (pale): median", "", "seconds"),
)
_COLUMNS = 2


def page_of(totals: Totals, records: Sequence[Record], readings: Sequence[Reading] = ()) -> str:
    """Of the last of the totals' runs, whose records and readings these are."""
    title = f"{totals.workload.name} at {totals.facts.server}"
    plots = to_html(_figure(totals, records, readings), include_plotlyjs=True, full_html=False)
    facts = f"{totals.facts.began_at}, {totals.facts.machine}, {totals.facts.cores} cores"
    run = totals.runs[-1]
    fair = "" if run.fairness is None else f", Jain's index of the tenants' throughput {run.fairness:.3f}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<title>{escape(title)}</title></head><body style="font-family: sans-serif"><h1>{escape(title)}</h1>'
        f"<p>{escape(facts + fair)}</p>{plots}</body></html>"
    )


def _figure(totals: Totals, records: Sequence[Record], readings: Sequence[Reading]) -> go.Figure:
    rows = len(_PLOTS) // _COLUMNS
    figure = make_subplots(rows, _COLUMNS, subplot_titles=[title for title, _, _ in _PLOTS], vertical_spacing=0.09)
    for place, (_, x, y) in enumerate(_PLOTS):
        figure.update_xaxes(title_text=x, **_at(place))
        figure.update_yaxes(title_text=y, **_at(place))
    run = totals.runs[-1]
    for kind in sorted(run.by_kind):
        chosen = [record for record in records if record.kind == kind]
        by_tenant = {escape(tenant): kinds[kind] for tenant, kinds in run.by_tenant.items() if kind in kinds}
        splits = splits_of(readings)
        for place, trace in enumerate(_traces(kind, chosen, by_tenant, run.by_kind[kind].errors, splits)):
            for drawn in trace:
                figure.add_trace(drawn, **_at(place))
    warm_up = {"x0": 0, "x1": totals.workload.warm_up_s, "y0": 0, "y1": 1, "xref": "x", "yref": "y domain"}
    figure.add_shape(type="rect", fillcolor="grey", opacity=0.15, line_width=0, **warm_up)
    figure.update_layout(height=370 * rows, barmode="group", margin={"t": 60})
    return figure


def _at(place: int) -> dict[str, Any]:
    return {"row": place // _COLUMNS + 1, "col": place % _COLUMNS + 1}


def _traces(
    kind: str,
    records: Sequence[Record],
    by_tenant: Mapping[str, Figures],
    errors: Mapping[str, int],
    splits: Sequence[Split],
) -> Iterator[list[Any]]:
    """In the order of the plots. Clicking a kind in the legend takes it out of all."""
    colour, own = _COLOURS[kind], {"name": kind, "legendgroup": kind, "showlegend": False}
    times, rates = _throughput(records)
    yield [go.Scatter(x=times, y=rates, line_color=colour, **own | {"showlegend": True})]
    times, under_way = _under_way(records)
    yield [go.Scatter(x=times, y=under_way, line_shape="hv", line_color=colour, **own)]
    latencies = sorted(record.latency_s for record in records if record.error is None and not record.is_warm_up)
    shares = [100 * (i + 1) / len(latencies) for i in range(len(latencies))]
    yield [go.Scatter(x=latencies, y=shares, line_color=colour, **own)]
    spreads = {tenant: of.latency_s for tenant, of in by_tenant.items() if of.latency_s is not None}
    bars = ((1.0, [spread.p50 for spread in spreads.values()]), (0.4, [spread.p99 for spread in spreads.values()]))
    yield [go.Bar(x=list(spreads), y=y, opacity=opacity, marker_color=colour, **own) for opacity, y in bars]
    rates = [of.tokens_per_s for of in by_tenant.values()]
    yield [go.Bar(x=list(by_tenant), y=rates, marker_color=colour, **own)]
    yield [go.Bar(x=[*map(escape, errors)], y=list(errors.values()), marker_color=colour, **own)]
    times = [time for split in splits for time in (split.start_s, split.end_s, None)]
    shares = [share for split in splits for share in (*[100 * getattr(split, kind)] * 2, None)]
    yield [go.Scatter(x=times, y=shares, line_color=colour, mode="lines", **own)]
    first = {tenant: of.first_token_s.p50 for tenant, of in by_tenant.items() if of.first_token_s is not None}
    between = {tenant: of.between_tokens_s.p50 for tenant, of in by_tenant.items() if of.between_tokens_s is not None}
    yield [
        go.Bar(x=list(each), y=list(each.values()), opacity=opacity, marker_color=colour, **own)
        for opacity, each in ((1.0, first), (0.4, between))
    ]


def _throughput(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Tokens of what ended in each of some equal stretches of time."""
    end = max((record.done_s for record in records), default=0.0)
    width = end / _BINS or 1.0
    sums = [0.0] * _BINS
    for record in records:
        if record.error is None:
            sums[min(_BINS - 1, int(record.done_s / width))] += record.tokens
    return [(i + 0.5) * width for i in range(_BINS)], [tokens / width for tokens in sums]


def _under_way(records: Sequence[Record]) -> tuple[list[float], list[int]]:
    def changes() -> Iterator[tuple[float, int]]:
        for record in records:
            yield record.due_s, 1
            yield record.done_s, -1

    ordered = sorted(changes())
    return [time for time, _ in ordered], list(accumulate(change for _, change in ordered))
