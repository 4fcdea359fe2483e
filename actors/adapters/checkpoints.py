"""Checkpoints' folders: PEFT's own files, and for training states the optimizer's beside them."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...wire.errors import CheckpointError
from ..model.adapter import Adapter, AdapterSpec, TrainingState
from ..model.lora import LoraTargets
from .folders import FolderFacts, read_json, seal, verify, write_json, written_aside
from .tensors import read_tensors, write_tensors

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_PREFIX = "base_model.model."
_FORMAT = 1


def save_state(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> FolderFacts:
    """The whole training state: weights, moments, step count and the pending gradient if there is one.

    PEFT and vLLM load the folder as it is. A folder of that name is replaced.
    """
    with written_aside(folder) as aside:
        _write_weights(adapter, targets, aside, base_model_name)
        write_state(aside, _OPTIMIZER, adapter.state(copied=False), weights=False)
        return seal(aside)


def save_sampler_weights(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> FolderFacts:
    """The weights alone, as PEFT and vLLM load them. A folder of that name is replaced."""
    with written_aside(folder) as aside:
        _write_weights(adapter, targets, aside, base_model_name)
        return seal(aside)


def load_state(adapter: Adapter, folder: Path, *, optimizer: bool) -> None:
    """Sets `adapter` to the saved weights, and with `optimizer` to the saved moments and step count.

    Without `optimizer` these start afresh. No gradient is pending afterwards, whatever was saved. Raises
    CheckpointError, with nothing changed, where a file is missing, differs from its checksum or is of another shape
    than the adapter.
    """
    verify(folder)
    if optimizer:
        state = replace(read_state(adapter, folder), grad=None)
    else:
        state = TrainingState(_read_weights(folder, adapter), None, None, None, step=0)
    adapter.set_state(state)


def read_state(adapter: Adapter, folder: Path) -> TrainingState:
    """What was saved of an adapter of this shape, with its pending gradient. The folder is verified already."""
    return read_vectors(adapter, folder, _OPTIMIZER, _read_weights(folder, adapter))


def write_state(folder: Path, file: str, state: TrainingState, *, weights: bool) -> None:
    """Its flat vectors, the `weights` among them or not, and beside them how many steps it took."""
    vectors = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq, "grad": state.grad}
    vectors |= {"weights": state.weights} if weights else {}
    write_tensors(folder / file, {name: vector for name, vector in vectors.items() if vector is not None})
    write_json(folder / _STATE, {"format": _FORMAT, "step": state.step, "pending": state.grad is not None})


def read_vectors(adapter: Adapter, folder: Path, file: str, weights: Tensor | None = None) -> TrainingState:
    """What `write_state` wrote of an adapter of this shape; the weights are in the file unless they are given."""
    vectors, facts = read_tensors(folder / file), read_json(folder / _STATE)
    if facts["format"] != _FORMAT:
        raise CheckpointError(f"{folder / _STATE} is of format {facts['format']}, expected {_FORMAT}")
    wanted = {"exp_avg", "exp_avg_sq"} | ({"grad"} if facts["pending"] else set())
    wanted |= {"weights"} if weights is None else set()
    if vectors.keys() != wanted or any(vector.shape != adapter.weights.shape for vector in vectors.values()):
        raise CheckpointError(f"{folder / file} does not fit an adapter of {adapter.size} parameters")
    found = vectors["weights"] if weights is None else weights
    return TrainingState(found, vectors["exp_avg"], vectors["exp_avg_sq"], vectors.get("grad"), facts["step"])


def load_sampler_weights(targets: LoraTargets, folder: Path, device: torch.device | str) -> Adapter:
    """An adapter for sampling, from a folder of either kind. Raises CheckpointError as `load_state` does."""
    verify(folder)
    config = read_json(folder / _CONFIG)
    names = {key.removeprefix(_PREFIX).rsplit(".", 2)[0] for key in read_tensors(folder / _WEIGHTS)}
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
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.T
    write_tensors(folder / _WEIGHTS, tensors)
    config = LoraConfig(
        base_model_name_or_path=base_model_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=adapter.spec.rank,
        lora_alpha=adapter.spec.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets.peft_names(adapter.targets),
    ).to_dict()
    write_json(folder / _CONFIG, config)


def _read_weights(folder: Path, adapter: Adapter) -> Tensor:
    """The folder's weights in the adapter's own order, [P] on the host."""
    path = folder / _WEIGHTS
    tensors = read_tensors(path)
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
