"""A base model's weights as its files have them, one at a time, and plain: what is quantised is expanded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...wire.errors import UnsupportedModelError

_ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BEHIND = {"_scales": "_blocks", "_scale_inv": "", ".weight_scale": ".weight_packed", ".weight_shape": ".weight_packed"}
"""What only says how another tensor is to be read, and the name of that in its place."""


class BaseFiles:
    """Each in its own dtype; what is quantised is expanded to `dtype`."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Raises UnsupportedModelError where there is no configuration, or no safetensors."""
        self.folder, self._dtype = folder, dtype
        self.config: dict[str, Any] = _json(folder / "config.json")
        self._file_of = _files_by_name(folder)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Raises UnsupportedModelError for a file that cannot be read."""
        for name in sorted(self._file_of, key=lambda name: (self._file_of[name], name)):
            if not self._is_behind(name):
                yield self._expanded(name)

    def _is_behind(self, name: str) -> bool:
        return any(
            name.endswith(end) and name.removesuffix(end) + other in self._file_of for end, other in _BEHIND.items()
        )

    def _expanded(self, name: str) -> tuple[str, Tensor]:
        dtype, stem = self._dtype, name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in self._file_of:
            return stem, _from_mxfp4(self._read(name), self._read(f"{stem}_scales"), dtype)
        stem = name.removesuffix(".weight_packed")
        if stem != name:
            scale, shape = (self._read(f"{stem}.weight_{fact}") for fact in ("scale", "shape"))
            return f"{stem}.weight", _from_packed(self._read(name), scale, shape, self._quantised).to(dtype)
        weight = self._read(name)
        if f"{name}_scale_inv" in self._file_of:
            return name, _from_fp8(weight, self._read(f"{name}_scale_inv"), self._quantised).to(dtype)
        return name, weight

    @property
    def _quantised(self) -> dict[str, Any]:
        return self.config.get("quantization_config", {})

    def _read(self, name: str) -> Tensor:
        path = self.folder / self._file_of[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError, KeyError) as error:
            raise UnsupportedModelError(f"{name} cannot be read from {path}: {error}") from error


def _files_by_name(folder: Path) -> dict[str, str]:
    """Of every tensor, the file that it is in."""
    if (folder / INDEX).is_file():
        return _json(folder / INDEX)["weight_map"]
    try:
        with safe_open(folder / _ONE, "pt") as file:
            return dict.fromkeys(file.keys(), _ONE)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{folder} has no base model in safetensors: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}") from error


def _from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[experts, outputs, inputs / 32, 16] and [experts, outputs, inputs / 32] uint8 -> [experts, inputs, outputs]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype)


def _from_fp8(weight: Tensor, factors: Tensor, quantised: dict[str, Any]) -> Tensor:
    """[outputs, inputs], and a factor for each block, of which the last may be cut off."""
    rows, columns = quantised["weight_block_size"]
    each = factors.float().repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)
    return weight.float() * each[:, : weight.shape[1]]


def _from_packed(packed: Tensor, scale: Tensor, shape: Tensor, quantised: dict[str, Any]) -> Tensor:
    """Codes in int32, as compressed-tensors packs them, and a scale for each group of a row -> [outputs, inputs]."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    (group,) = quantised["config_groups"].values()
    codes = unpack_from_int32(packed, group["weights"]["num_bits"], torch.Size(shape.tolist()))
    return codes.float() * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
