"""What a workload is: a TOML file that names tenants, when their requests arrive, and what these are. Pure."""

import tomllib
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from lorry.wire.errors import InvalidRequestError

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Positive: TypeAlias = Annotated[float, Meta(gt=0)]
Range: TypeAlias = Count | Annotated[list[Count], Meta(min_length=2, max_length=2)]
"""One number, or the least and the greatest of which one is drawn for each request."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Closed(_Strict, frozen=True, tag="closed", tag_field="kind"):
    """So many requests are always under way; each is followed by another after `think_s`. They begin one after the
    other, within `ramp_up_s`."""

    concurrency: Count = 1
    think_s: Seconds = 0.0
    ramp_up_s: Seconds = 0.0


class Poisson(_Strict, frozen=True, tag="poisson", tag_field="kind"):
    """Independent arrivals, whatever the server makes of those before. The rate grows evenly within `ramp_up_s`."""

    rate_per_s: Positive
    ramp_up_s: Seconds = 0.0


class Gamma(_Strict, frozen=True, tag="gamma", tag_field="kind"):
    """As Poisson, with gaps of a gamma distribution: `cv` is their standard deviation over their mean. Above 1 they
    come in clusters, below 1 evenly."""

    rate_per_s: Positive
    cv: Positive
    ramp_up_s: Seconds = 0.0


class Burst(_Strict, frozen=True, tag="burst", tag_field="kind"):
    """`size` at once, every so often."""

    size: Count
    every_s: Positive


class Recorded(_Strict, frozen=True, tag="recorded", tag_field="kind"):
    """At these seconds from the start, in order; the request that comes n-th is the tenant's n-th work."""

    at_s: Annotated[list[Seconds], Meta(min_length=1)]


OpenLoop: TypeAlias = Poisson | Gamma | Burst | Recorded
Arrival: TypeAlias = Closed | OpenLoop


class Train(_Strict, frozen=True, tag="train", tag_field="kind"):
    """A forward_backward of so many rows, with an optim_step behind it unless `step` is false. Of a tenant's kinds of
    work one is drawn by `weight` for each request."""

    rows: Range = 1
    tokens: Range = 128
    loss_fn: Literal["cross_entropy", "importance_sampling", "ppo"] = "cross_entropy"
    step: bool = True
    weight: Positive = 1.0


class Sample(_Strict, frozen=True, tag="sample", tag_field="kind"):
    """So many continuations of one prompt, whose first `shared_prefix` tokens are the same in all of the tenant's. From
    the weights of the tenant's run as they were at the start; with `base`, from the bare base model."""

    prompt_tokens: Range = 64
    shared_prefix: Annotated[int, Meta(ge=0)] = 0
    max_tokens: Range = 64
    samples: Count = 1
    base: bool = False
    weight: Positive = 1.0


Work: TypeAlias = Train | Sample


class Tenant(_Strict, frozen=True):
    """`count` of them, each with a run of its own, of `rank` on what `train_mlp` and its like say."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
    work: Annotated[list[Work], Meta(min_length=1)]
    arrival: Arrival = Closed()
    count: Count = 1
    rank: Count = 32
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True

    @property
    def samples_base(self) -> bool:
        return any(isinstance(work, Sample) and work.base for work in self.work)

    @property
    def samples_own(self) -> bool:
        return any(isinstance(work, Sample) and not work.base for work in self.work)

    @property
    def has_run(self) -> bool:
        """Whether anything of its work wants one."""
        return self.samples_own or any(isinstance(work, Train) for work in self.work)


class Limits(_Strict, frozen=True):
    """A request that took longer than its kind's does not count for goodput."""

    train_s: Positive | None = None
    sample_s: Positive | None = None


class Workload(_Strict, frozen=True):
    """After `warm_up_s`, whose requests are left out of the figures, `duration_s`. Token ids are below `vocab`."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: str
    tenants: Annotated[list[Tenant], Meta(min_length=1)]
    seed: int = 0
    warm_up_s: Seconds = 2.0
    duration_s: Positive = 30.0
    vocab: Annotated[int, Meta(ge=2)] = 1000
    limits: Limits = Limits()


def parse_workload(text: str, *, is_json: bool = False) -> Workload:
    """TOML, or JSON of the same. Raises InvalidRequestError, which names the field."""
    try:
        found = msgspec.json.decode(text) if is_json else tomllib.loads(text)
        workload = msgspec.convert(found, Workload, strict=False)
    except (tomllib.TOMLDecodeError, msgspec.DecodeError) as error:
        raise InvalidRequestError(f"workload: {error}", field="workload") from None
    _check(workload)
    return workload


def _check(workload: Workload) -> None:
    names = [name for tenant in workload.tenants for name in names_of(tenant)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequestError.of("tenants[].name", twice, "a name that no other tenant has")
    for tenant in workload.tenants:
        if isinstance(tenant.arrival, Recorded):
            times = tenant.arrival.at_s
            if len(times) != len(tenant.work) or times != sorted(times):
                where = f"tenants[{tenant.name!r}].arrival.at_s"
                raise InvalidRequestError.of(where, times, f"{len(tenant.work)} times in order, one for each work")
        for work in tenant.work:
            for field in ("rows", "tokens", "prompt_tokens", "max_tokens"):
                value = getattr(work, field, 1)
                if isinstance(value, list) and value[0] > value[1]:
                    where = f"tenants[{tenant.name!r}].work.{field}"
                    raise InvalidRequestError.of(where, value, "the least number, then the greatest")
            if isinstance(work, Sample) and work.shared_prefix > _least(work.prompt_tokens):
                where = f"tenants[{tenant.name!r}].work.shared_prefix"
                raise InvalidRequestError.of(where, work.shared_prefix, "no more than the shortest prompt has")


def names_of(tenant: Tenant) -> list[str]:
    return [tenant.name] if tenant.count == 1 else [f"{tenant.name}-{i}" for i in range(tenant.count)]


def _least(value: Range) -> int:
    return value if isinstance(value, int) else value[0]
