"""What `lorry plan` prints: what a base model and its adapters take, and on how many devices they fit."""

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from lorry.actors.group.dividing import outline_of_rank
from lorry.actors.model.recomputing import PassCost
from lorry.actors.model.sizing import PASS_TOKENS, Sizing, described, sizing
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.foreseen import Share, foresee_pass
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


def print_plan(
    console: Console, model: str, dtype: str, rank: int, devices: Devices | None, quantize: Quantization
) -> None:
    """Raises UnsupportedModelError and InvalidRequestError."""
    itemsize = floating(dtype).itemsize
    config = described(model)
    size, cost = sizing(config), foresee_pass(config, floating(dtype))
    console.print(_of_model(model, size, dtype, itemsize, quantize))
    console.print(_of_passes(cost))
    console.print(_of_adapters(size, itemsize))
    if devices is not None:
        console.print(_verdict(config, size, floating(dtype), AdapterSpec(rank), devices, quantize), soft_wrap=True)


def _of_model(model: str, size: Sizing, dtype: str, itemsize: int, quantize: Quantization) -> Table:
    table = Table(model, "", title="The base model", title_justify="left")
    table.add_row("parameters", f"{size.parameters / 1e9:,.3f} billion")
    for name, width in {dtype: itemsize, "float32": 4}.items():
        table.add_row(f"weights in {name}", f"{size.weights_bytes(width) / _GIB:,.1f} GiB")
    if quantize != "none":
        taken = size.weights_bytes(itemsize, quantize)
        table.add_row(f"weights in {quantize}, the rest in {dtype}", f"{taken / _GIB:,.1f} GiB")
    table.add_row("keys and values of a token", f"{size.cache_numbers * itemsize / 1024:,.0f} KiB")
    if size.sites.frozen_experts:
        table.add_row("MLPs", f"are {size.sites.frozen_experts}, and stay frozen")
    return table


def _of_passes(cost: PassCost) -> Table:
    table = Table("a training pass of one row", title="With a rank 8 adapter, without the base", title_justify="left")
    table.add_column("GiB", justify="right")
    table.add_column("with all layers computed again", justify="right")
    for tokens in _ROWS:
        each = (cost.bytes([tokens], again) / _GIB for again in (0, cost.layers))
        table.add_row(f"{tokens:,} tokens", *(f"{taken:,.1f}" for taken in each))
    return table


def _of_adapters(size: Sizing, itemsize: int) -> Table:
    table = Table("an adapter", "rank", title="With its optimizer, on the device", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("GiB", justify="right")
    kinds = {"on everything": AdapterSpec(1), "on attention": AdapterSpec(1, train_mlp=False, train_unembed=False)}
    if any(target.experts for target in size.sites.targets):
        kinds["on everything, independent experts"] = AdapterSpec(1, expert_lora="independent")
    for name, kind in kinds.items():
        for rank in _RANKS:
            spec = AdapterSpec(
                rank,
                train_mlp=kind.train_mlp and not size.sites.frozen_experts,
                train_unembed=kind.train_unembed,
                expert_lora=kind.expert_lora,
            )
            parameters, taken = size.adapter_parameters(spec), size.adapter_bytes(spec, itemsize)
            table.add_row(name, str(rank), f"{parameters / 1e6:,.1f} million", f"{taken / _GIB:,.2f}")
    return table


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
