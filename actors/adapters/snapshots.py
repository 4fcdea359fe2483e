"""Adapter folders: PEFT's own files, the optimizer's state, checksums; written aside, fsynced, renamed.

A folder is either complete or absent. Knows paths it is given, never who named them or where else they are recorded.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...wire.errors import CheckpointError
from ..model.adapter import Adapter, AdapterSpec
from ..model.lora import LoraTargets

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_CHECKSUMS = "checksums.json"
_PREFIX = "base_model.model."
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """What is recorded of a folder: the bytes of its files, and the SHA-256 of its list of checksums, in hex."""

    size_bytes: int
    sha256: str


def save_state(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> SnapshotFacts:
    """The whole training state: weights, moments, step count and the pending gradient if there is one.

    PEFT and vLLM load the folder as it is. A folder of that name is replaced.
    """
    with _written_aside(folder) as aside:
        _write_weights(adapter, targets, aside, base_model_name)
        vectors = {"exp_avg": adapter.exp_avg, "exp_avg_sq": adapter.exp_avg_sq}
        if adapter.pending:
            vectors["grad"] = adapter.grad
        save_file({name: vector.cpu() for name, vector in vectors.items()}, aside / _OPTIMIZER)
        _write_json(aside / _STATE, {"format": _FORMAT, "step": adapter.step, "pending": adapter.pending})
        return _seal(aside)


def save_sampler_weights(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> SnapshotFacts:
    """The weights alone, as PEFT and vLLM load them. A folder of that name is replaced."""
    with _written_aside(folder) as aside:
        _write_weights(adapter, targets, aside, base_model_name)
        return _seal(aside)


def load_state(adapter: Adapter, folder: Path, *, optimizer: bool) -> None:
    """Sets `adapter` to the saved weights, and with `optimizer` to the saved moments and step count.

    Without `optimizer` these start afresh. No gradient is pending afterwards, whatever was saved. Raises
    CheckpointError, with nothing changed, where a file is missing, differs from its checksum or is of another shape
    than the adapter.
    """
    _load(adapter, folder, optimizer=optimizer, gradient=False)


def restore_state(adapter: Adapter, folder: Path) -> None:
    """Makes `adapter` what it was when it was saved, its pending gradient included. Raises as `load_state` does."""
    _load(adapter, folder, optimizer=True, gradient=True)


def _load(adapter: Adapter, folder: Path, *, optimizer: bool, gradient: bool) -> None:
    _verify(folder)
    weights = _read_weights(folder, adapter)
    vectors: dict[str, Tensor] = {}
    state: dict[str, Any] = {"step": 0}
    if optimizer:
        vectors, state = _read_tensors(folder / _OPTIMIZER), _read_json(folder / _STATE)
        if state["format"] != _FORMAT:
            raise CheckpointError(f"{folder / _STATE} is of format {state['format']}, expected {_FORMAT}")
        wanted = {"exp_avg", "exp_avg_sq"} | ({"grad"} if state["pending"] else set())
        if vectors.keys() != wanted or any(vector.shape != adapter.weights.shape for vector in vectors.values()):
            raise CheckpointError(f"{folder / _OPTIMIZER} does not fit an adapter of {adapter.size} parameters")
    if not gradient:
        vectors.pop("grad", None)
    adapter.weights.copy_(weights)
    for name in ("exp_avg", "exp_avg_sq", "grad"):
        vector: Tensor = getattr(adapter, name)
        vector.copy_(vectors[name]) if name in vectors else vector.zero_()
    adapter.step, adapter.pending = state["step"], "grad" in vectors
    adapter.refresh()


def load_sampler_weights(targets: LoraTargets, folder: Path, device: torch.device | str) -> Adapter:
    """An adapter for sampling, from a folder of either kind. Raises CheckpointError as `load_state` does."""
    _verify(folder)
    config = _read_json(folder / _CONFIG)
    names = {key.removeprefix(_PREFIX).rsplit(".", 2)[0] for key in _read_tensors(folder / _WEIGHTS)}
    chosen = [target for target in targets.modules if target.name in names]
    if not chosen:
        raise CheckpointError(f"{folder / _WEIGHTS} trains {sorted(names)[:1]}, which this base model does not have")
    groups = {target.group for target in chosen}
    spec = AdapterSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        train_attn="attn" in groups,
        train_mlp="mlp" in groups,
        train_unembed="unembed" in groups,
    )
    adapter = Adapter(spec, chosen, dtype=targets.dtype, device=device, trainable=False)
    adapter.weights.copy_(_read_weights(folder, adapter))
    adapter.refresh()
    return adapter


def _write_weights(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> None:
    from peft import LoraConfig  # takes seconds to import, and only saving needs it

    tensors: dict[str, Tensor] = {}
    for name, (a, b) in adapter.module_weights().items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.T.cpu().contiguous()
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig(
        base_model_name_or_path=base_model_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=adapter.spec.rank,
        lora_alpha=adapter.spec.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets.peft_names(adapter.targets),
    ).to_dict()
    _write_json(folder / _CONFIG, config)


def _read_weights(folder: Path, adapter: Adapter) -> Tensor:
    """The folder's weights in the adapter's own order, [P] on the host."""
    path = folder / _WEIGHTS
    tensors = _read_tensors(path)
    flat = torch.empty(adapter.size)
    for (name, (a, b)), (to_a, to_b) in zip(adapter.module_weights().items(), adapter.views(flat), strict=True):
        for key, like, to in ((f"{name}.lora_A", a, to_a), (f"{name}.lora_B", b.T, to_b.T)):
            found = tensors.pop(f"{_PREFIX}{key}.weight", None)
            if found is None or found.shape != like.shape:
                shape = "no" if found is None else f"a {list(found.shape)}"
                raise CheckpointError(f"{path} has {shape} {key}, expected {list(like.shape)}")
            to.copy_(found)
    if tensors:
        raise CheckpointError(f"{path} trains {min(tensors)}, which the adapter does not")
    return flat


@contextmanager
def _written_aside(folder: Path) -> Generator[Path]:
    """A new folder beside `folder`, which takes its name once all is written; removed where writing fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        yield aside
        if folder.exists():
            former = aside.with_name(f"{aside.name}.former")
            folder.rename(former)
            aside.rename(folder)
            shutil.rmtree(former)
        else:
            aside.rename(folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _seal(folder: Path) -> SnapshotFacts:
    """Writes the checksums of all files and makes the folder durable."""
    files = sorted(folder.iterdir())
    _write_json(folder / _CHECKSUMS, {path.name: _sha256(path) for path in files})
    files.append(folder / _CHECKSUMS)
    for path in (*files, folder):
        _fsync(path)
    return SnapshotFacts(sum(path.stat().st_size for path in files), _sha256(folder / _CHECKSUMS))


def _verify(folder: Path) -> None:
    for name, expected in _read_json(folder / _CHECKSUMS).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if (found := _sha256(path)) != expected:
            raise CheckpointError(f"{path} has SHA-256 {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n")  # PEFT's config holds sets


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
