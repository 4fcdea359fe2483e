"""What `lorry plan` prints: what a base model and its adapters take, and on how many devices they fit."""

from dataclasses import dataclass

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from lorry.actors.group.dividing import outline_of_rank
from lorry.actors.model.sizing import PASS_TOKENS, Sizing, described, sizing
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.foreseen import Share, foresee_pass
from lorry.tables import print_table
from lorry.wire.errors import InvalidRequestError
from lorry.wire.types import Quantization

_GIB = 2**30
_RANKS = (8, 32, 64)
_ROWS = (1024, 8192, 32_768)
_CACHE_SHARE = 2 / 5
"""Of what the model leaves free on an accelerator, as an actor takes it."""


@dataclass(frozen=True, slots=True)
class Devices:
    count: int
    gib_each: float

    @property
    def bytes_each(self) -> float:
        return self.gib_each * _GIB


def floating(dtype: str) -> torch.dtype:
    """Raises InvalidRequestError for a name that is none of torch's for floating point."""
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidRequestError.of("dtype", dtype, "float32, bfloat16 or float16")
    return found


@dataclass(frozen=True, slots=True)
class PassTaken:
    """Of one row, with a rank 8 adapter, beside the base; with every layer computed again, too."""

    tokens: int
    bytes: int
    bytes_computed_again: int


@dataclass(frozen=True, slots=True)
class AdapterTaken:
    """With its optimizer, on the device."""

    on: str
    rank: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`weights_bytes` are by dtype. `cache_bytes` are the keys and values of a token. `verdict` is of the devices that
    were asked about."""

    model: str
    parameters: int
    weights_bytes: dict[str, int]
    cache_bytes: int
    frozen_experts: str | None
    passes: list[PassTaken]
    adapters: list[AdapterTaken]
    verdict: str | None


def foresee(model: str, dtype: str, rank: int, devices: Devices | None, quantize: Quantization) -> Plan:
    """Raises UnsupportedModelError and InvalidRequestError."""
    itemsize = floating(dtype).itemsize
    config = described(model)
    size, cost = sizing(config), foresee_pass(config, floating(dtype))
    weights = {name: size.weights_bytes(width) for name, width in {dtype: itemsize, "float32": 4}.items()}
    if quantize != "none":
        weights[f"{quantize}, the rest in {dtype}"] = size.weights_bytes(itemsize, quantize)
    asked = devices and _verdict(config, size, floating(dtype), AdapterSpec(rank), devices, quantize)
    passes = [PassTaken(n, int(cost.bytes([n], 0)), int(cost.bytes([n], cost.layers))) for n in _ROWS]
    return Plan(
        model,
        size.parameters,
        {name: int(taken) for name, taken in weights.items()},
        int(size.cache_numbers * itemsize),
        size.sites.frozen_experts,
        passes,
        _adapters(size, itemsize),
        asked,
    )


def _adapters(size: Sizing, itemsize: int) -> list[AdapterTaken]:
    taken: list[AdapterTaken] = []
    kinds = {"everything": AdapterSpec(1), "attention": AdapterSpec(1, train_mlp=False, train_unembed=False)}
    if any(target.experts for target in size.sites.targets):
        kinds["everything, independent experts"] = AdapterSpec(1, expert_lora="independent")
    for name, kind in kinds.items():
        for rank in _RANKS:
            spec = AdapterSpec(
                rank,
                train_mlp=kind.train_mlp and not size.sites.frozen_experts,
                train_unembed=kind.train_unembed,
                expert_lora=kind.expert_lora,
            )
            taken.append(
                AdapterTaken(name, rank, size.adapter_parameters(spec), int(size.adapter_bytes(spec, itemsize)))
            )
    return taken


def print_plan(console: Console, plan: Plan) -> None:
    _print_model(console, plan)
    _print_passes(console, plan)
    _print_adapters(console, plan)
    if plan.verdict is not None:
        console.print(plan.verdict, soft_wrap=True)


def _print_model(console: Console, plan: Plan) -> None:
    rows = [("parameters", f"{plan.parameters / 1e9:,.3f} billion")]
    rows += [(f"weights in {name}", f"{taken / _GIB:,.1f} GiB") for name, taken in plan.weights_bytes.items()]
    rows.append(("keys and values of a token", f"{plan.cache_bytes / 1024:,.0f} KiB"))
    if plan.frozen_experts:
        rows.append(("MLPs", f"are {plan.frozen_experts}, and stay frozen"))
    print_table((plan.model, ""), rows, "The base model", console=console)


def _print_passes(console: Console, plan: Plan) -> None:
    rows = [
        (f"{each.tokens:,} tokens", f"{each.bytes / _GIB:,.1f}", f"{each.bytes_computed_again / _GIB:,.1f}")
        for each in plan.passes
    ]
    columns = ("a training pass of one row", "GiB", "with all layers computed again")
    print_table(columns, rows, "With a rank 8 adapter, without the base", console=console)


def _print_adapters(console: Console, plan: Plan) -> None:
    rows = [
        (f"on {each.on}", f"{each.rank}", f"{each.parameters / 1e6:,.1f} million", f"{each.bytes / _GIB:,.2f}")
        for each in plan.adapters
    ]
    columns = ("an adapter", "rank", "parameters", "GiB")
    print_table(columns, rows, "With its optimizer, on the device", console=console)


def _verdict(
    config: PreTrainedConfig,
    size: Sizing,
    dtype: torch.dtype,
    spec: AdapterSpec,
    devices: Devices,
    quantize: Quantization,
) -> str:
    """Of adapters on everything, beside a short pass. Raises UnsupportedModelError where so many devices cannot share
    the model."""
    have, itemsize, bytes_each = f"{devices.count} x {devices.gib_each:g} GiB", dtype.itemsize, devices.bytes_each
    if devices.count > 1 and quantize != "none":
        raise InvalidRequestError.of("gpus", devices.count, "1: a base in 4 bits is not shared among devices")
    own = size.of_rank(devices.count)
    if own.least_bytes(spec, itemsize, quantize) > bytes_each:
        if quantize != "none":
            return f"{have}: too little for the weights, one adapter of rank {spec.rank} and a pass."
        needed = size.least_ranks(spec, itemsize, int(bytes_each))
        enough = "no number of them up to 64 is enough" if needed is None else f"it takes {needed} such devices"
        return f"{have}: too little for the weights, one adapter of rank {spec.rank} and a pass: {enough}."
    free = bytes_each - own.weights_bytes(itemsize, quantize)
    cache, adapter = _CACHE_SHARE * free, own.adapter_bytes(spec, itemsize)
    cost = foresee_pass(config, dtype, _share_among(devices.count))
    slots = max(1, int((free - cache - cost.bytes([PASS_TOKENS], 0)) // adapter))
    tokens = int(cache // (own.cache_numbers * itemsize))
    together = f"--tensor-parallel {devices.count} " if devices.count > 1 else ""
    return (
        f"{have}: {together}--slots {slots} for rank {spec.rank}, more adapters in host memory and on disk, and keys "
        f"and values of {tokens:,} tokens. Beside one adapter and those, the longest row that trains has "
        f"{cost.longest(int(free - cache - adapter)):,} tokens."
    )


def _share_among(ranks: int) -> Share | None:
    return None if ranks == 1 else lambda base, targets: outline_of_rank(base, targets, ranks)
