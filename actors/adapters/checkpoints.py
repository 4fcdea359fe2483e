"""Checkpoints' folders: PEFT's own files, and for training states the optimizer's beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...wire.errors import CheckpointError
from ..model.adapter import Adapter, TrainingState
from ..model.lora import LoraTargets
from ..model.spec import AdapterSpec, Target
from .folders import FolderFacts, read_json, seal, verify, write_json, written_aside
from .layouts import Factors, fit, is_shared, read, written
from .tensors import read_tensors, write_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
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


def save_without_moments(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> FolderFacts:
    """Weights from elsewhere, to sample from and to train on: whoever loads them begins without moments."""
    with written_aside(folder) as aside:
        _write_weights(adapter, targets, aside, base_model_name)
        write_json(aside / _STATE, {"format": _FORMAT, "step": 0, "pending": False, "moments": False})
        return seal(aside)


def load_state(adapter: Adapter, folder: Path, *, optimizer: bool) -> None:
    """Sets `adapter` to the saved weights, and with `optimizer` to the saved moments and step count.

    Without `optimizer` these start afresh, and where an adapter from elsewhere has none. No gradient is pending
    afterwards, whatever was saved. Raises CheckpointError, with nothing changed, where a file is missing, differs from
    its checksum or is of another shape than the adapter.
    """
    verify(folder)
    if optimizer and not _is_without_moments(folder):
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


def _is_without_moments(folder: Path) -> bool:
    path = folder / _STATE
    return path.exists() and not read_json(path).get("moments", True)


def load_sampler_weights(targets: LoraTargets, folder: Path, device: torch.device | str) -> Adapter:
    """An adapter for sampling, from a folder of either kind. Raises CheckpointError as `load_state` does."""
    verify(folder)
    config, path = read_json(folder / CONFIG), folder / WEIGHTS
    factors, left = read_factors(path, targets.modules)
    if left or not factors:
        raise CheckpointError(f"{path} trains {min(left, default='nothing')}, which this base model does not have")
    chosen = [target for target in targets.modules if target.name in factors]
    groups = {target.group for target in chosen}
    spec = AdapterSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        train_attn="attn" in groups,
        train_mlp="mlp" in groups,
        train_unembed="unembed" in groups,
        expert_lora="shared" if is_shared(factors, chosen) else "independent",
    )
    adapter = Adapter(spec, chosen, dtype=targets.dtype, device=device, trainable=False)
    fill(adapter, path, factors)
    return adapter


def read_factors(path: Path, targets: Sequence[Target]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """What a file has of the targets, by their names, and what belongs to none of them."""
    tensors = read_tensors(path)
    try:
        return read(tensors, targets), tensors
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def fill(adapter: Adapter, path: Path, factors: Mapping[str, Factors]) -> None:
    """With what was read of `path`. Raises CheckpointError for what does not fit, with nothing changed."""
    adapter.weights.copy_(_flat(path, adapter, factors))
    adapter.refresh()


def _write_weights(adapter: Adapter, targets: LoraTargets, folder: Path, base_model_name: str) -> None:
    from peft import LoraConfig  # only saving needs it

    write_tensors(folder / WEIGHTS, written(adapter, targets.layout))
    modules, parameters = targets.peft_names(adapter.targets)
    config = LoraConfig(
        base_model_name_or_path=base_model_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=adapter.spec.rank,
        lora_alpha=adapter.spec.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=modules,
        target_parameters=parameters or None,
    ).to_dict()
    write_json(folder / CONFIG, config)


def _read_weights(folder: Path, adapter: Adapter) -> Tensor:
    """The folder's weights in the adapter's own order, [P] on the host."""
    path = folder / WEIGHTS
    factors, left = read_factors(path, adapter.targets)
    if left:
        raise CheckpointError(f"{path} trains {min(left)}, which the adapter does not")
    return _flat(path, adapter, factors)


def _flat(path: Path, adapter: Adapter, factors: Mapping[str, Factors]) -> Tensor:
    flat = torch.empty(adapter.size)
    for target, into in zip(adapter.targets, adapter.views(flat), strict=True):
        for letter, factor, to in zip("AB", factors.get(target.name, (None, None)), into, strict=True):
            if factor is None or (fitting := fit(factor, to)) is None:
                shape = "no" if factor is None else f"a {list(factor.shape)}"
                raise CheckpointError(f"{path} has {shape} {target.name}.lora_{letter}, expected {list(to.shape)}")
            to.copy_(fitting)
    return flat
