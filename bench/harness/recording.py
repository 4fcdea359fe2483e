"""A workload of what a service did: the same requests at the same times, of random tokens. Pure.

Who asked, and what, is not in it: tenants are numbered, and of contents there are lengths alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lorry.wire.errors import NotFoundError

from .workload import Recorded, Sample, Tenant, Train, Work, Workload

_TRAINED = ("train_mlp", "train_attn", "train_unembed")
_RANK = 8
"""Of the run that a tenant has who only sampled: whose weights those were is not looked up."""


def recorded(name: str, model: str, requests: Sequence[Mapping[str, Any]]) -> Workload:
    """`requests` are those of `storage.reports.requests_between`. Each run and each sampler becomes a tenant.

    The journal knows how many tokens a pass had, and how many rows: so its rows are as long as each other. Raises
    NotFoundError where there are none.
    """
    if not requests:
        raise NotFoundError(f"{model} has no finished pass or sample in that time", field="model")
    start = requests[0]["submitted_at"]
    lanes = dict[str, list[Mapping[str, Any]]]()
    for request in requests:
        lanes.setdefault(request["lane"], []).append(request)
    owners = {owner: number for number, owner in enumerate(dict.fromkeys(r["tenant"] for r in requests))}
    tenants = [
        Tenant(
            f"tenant-{owners[lane[0]['tenant']]}-{number}",
            [_work(request) for request in lane],
            Recorded([round(request["submitted_at"] - start, 4) for request in lane]),
            rank=lane[0]["rank"] or _RANK,
            **{name: bool(lane[0][name]) for name in _TRAINED if lane[0][name] is not None},
        )
        for number, lane in enumerate(lanes.values())
    ]
    seconds = requests[-1]["submitted_at"] - start
    return Workload(name, model, tenants, warm_up_s=0.0, duration_s=seconds + 1.0)


def _work(request: Mapping[str, Any]) -> Work:
    rows = request["rows"] or 1
    if request["kind"] == "forward_backward":
        return Train(rows=rows, tokens=_each(request["trained"], rows), step=bool(request["step"]))
    return Sample(
        prompt_tokens=_each(request["prompt"], 1),
        max_tokens=_each(request["sampled"], rows),
        samples=rows,
        base=bool(request["base"]),
    )


def _each(tokens: int | None, rows: int) -> int:
    return max(1, round((tokens or 0) / rows))
