"""Tiny checkpoints in the formats in which large models are published, and the weights that they were made of.

Codes and scales are drawn, and the weights computed from them as the formats say; scales are powers of two, so that
every weight is exact in bfloat16, too. Written from the formats' descriptions; nothing of transformers reads or writes
them here.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""E2M1 of the OCP's microscaling formats, without the sign."""
MXFP4_BLOCK, FP8_BLOCK, INT4_GROUP = 32, 128, 32

Quantise = Callable[[str, Tensor, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""A weight's key and the weight whose shape it is to have -> another weight, and what the file has of it."""


def write(model: PreTrainedModel, folder: Path, quantise: Quantise, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sets weights of `model` anew, writes them quantised, and returns all that it has now, by the model's own keys."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, parameter in model.state_dict().items():
            weights, files = quantise(key, parameter, generator)
            parameter.copy_(weights)
            tensors |= files
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / "model.safetensors")
    described = model.config.to_dict() | {"dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(described))
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def plain(key: str, like: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    weights = (torch.randn(like.shape, generator=generator) / 8).bfloat16()
    return weights.to(like.dtype), {key: weights}


def mxfp4(key: str, like: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Of experts' weights, [experts, inputs, outputs] in the model: blocks [experts, outputs, inputs / 32, 16] uint8,
    two codes a byte, the low four bits first; scales [experts, outputs, inputs / 32] uint8, exponents with a bias of
    127."""
    if not key.endswith(("gate_up_proj", "down_proj")):
        return plain(key, like, generator)
    experts, inputs, outputs = like.shape
    codes = torch.randint(0, 16, (experts, outputs, inputs // MXFP4_BLOCK, MXFP4_BLOCK), generator=generator)
    scales = torch.randint(121, 125, codes.shape[:-1], generator=generator)
    values = FP4_VALUES[codes % 8] * torch.where(codes >= 8, -1.0, 1.0) * torch.exp2(scales[..., None] - 127.0)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return values.flatten(2).mT, {f"{key}_blocks": packed, f"{key}_scales": scales.to(torch.uint8)}


def fp8(key: str, like: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Every linear layer's weight in E4M3 with a float32 factor for each block of 128 by 128; each expert's apart."""
    return _of_linears(key, like, generator, _fp8_matrix)


def int4(key: str, like: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Of routed experts alone, as compressed-tensors packs them: eight codes an int32, the first in the lowest bits, 8
    more than the value; a scale for every 32 of a row."""
    if ".experts." not in key:
        return plain(key, like, generator)
    return _of_linears(key, like, generator, _int4_matrix)


_Matrix = Callable[[str, tuple[int, ...], torch.Generator], tuple[Tensor, dict[str, Tensor]]]


def _of_linears(
    key: str, like: Tensor, generator: torch.Generator, matrix: _Matrix
) -> tuple[Tensor, dict[str, Tensor]]:
    """The model has gate and up of all experts in one weight, and files have a layer for each."""
    if like.dim() == 3:
        mixture, _, leaf = key.rpartition(".")
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        files: dict[str, Tensor] = {}
        experts: list[Tensor] = []
        for i in range(len(like)):
            pieces: list[Tensor] = []
            for name in names:
                shape = like.shape[1] // len(names), like.shape[2]
                piece, more = matrix(f"{mixture}.{i}.{name}.weight", shape, generator)
                pieces.append(piece)
                files |= more
            experts.append(torch.cat(pieces))
        return torch.stack(experts), files
    if like.dim() < 2 or not key.endswith("proj.weight"):
        return plain(key, like, generator)
    return matrix(key, tuple(like.shape), generator)


def _fp8_matrix(key: str, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    blocks = [-(-size // FP8_BLOCK) for size in shape]
    scales = torch.exp2(torch.randint(-5, -1, blocks, generator=generator).float())
    spread = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[: shape[0], : shape[1]]
    return codes.float() * spread, {key: codes, f"{key}_scale_inv": scales}


def _int4_matrix(key: str, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    codes = torch.randint(-8, 8, shape, generator=generator)
    scales = torch.exp2(torch.randint(-7, -3, (shape[0], shape[1] // INT4_GROUP), generator=generator).float())
    nibbles = (codes + 8).view(shape[0], shape[1] // 8, 8) << (4 * torch.arange(8))
    words = nibbles.sum(-1)
    packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    stem = key.removesuffix(".weight")
    return codes.float() * scales.repeat_interleave(INT4_GROUP, 1), {
        f"{stem}.weight_packed": packed,
        f"{stem}.weight_scale": scales.bfloat16(),
        f"{stem}.weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
