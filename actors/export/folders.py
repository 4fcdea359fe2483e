"""An adapter's folder as others want it: PEFT's and vLLM's, or a model's with the adapter in its weights."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...wire.errors import CheckpointError
from ..adapters import layouts
from ..adapters.checkpoints import CONFIG, WEIGHTS, load_sampler_weights, save_sampler_weights
from ..adapters.folders import read_json, seal, verify, written_aside
from ..adapters.tensors import tensor_names, write_tensors
from ..model.loading import without_weights
from ..model.lora import LoraTargets
from .base_files import INDEX, BaseFiles
from .merging import Addends

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 5 * 10**9
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def is_as_pefts(source: Path) -> bool:
    """Whether PEFT loads the adapter's folder as it is."""
    return layouts.layout_of(tensor_names(source / WEIGHTS)) == "peft"


def trains_head(source: Path) -> bool:
    return layouts.trains_head(tensor_names(source / WEIGHTS))


def copy_adapter(source: Path, destination: Path) -> None:
    """The weights alone of a checkpoint's folder of either kind. Raises CheckpointError where it is damaged."""
    verify(source)
    with written_aside(destination) as aside:
        for name in (CONFIG, WEIGHTS):
            shutil.copy(source / name, aside)
        seal(aside)


def convert_adapter(source: Path, destination: Path, base: Path) -> None:
    """From a checkpoint's folder of either layout and kind, as PEFT and vLLM load it.

    Raises CheckpointError where `source` is damaged or is no adapter of `base`'s, UnsupportedModelError where `base`
    describes no model.
    """
    targets = LoraTargets.of(without_weights(base), dtype=torch.float32)
    adapter = load_sampler_weights(targets, source, "cpu")
    save_sampler_weights(adapter, targets, destination, base_name(source))


def merge_adapter(source: Path, destination: Path, base: Path, dtype: torch.dtype | None = None) -> None:
    """As a model of transformers', in shards: one of them is in memory at a time, or the largest tensor.

    Weights are summed in float32 and rounded once, to `dtype`, by default the base's own. What is quantised is
    expanded, by default to bfloat16. A head that is tied to the embeddings gets weights of its own where the adapter
    trains it. Raises as `convert_adapter` does, UnsupportedModelError where `base` is not in safetensors, and OSError.
    """
    files, model = BaseFiles(base, dtype or torch.bfloat16), without_weights(base)
    adapter = load_sampler_weights(LoraTargets.of(model, dtype=torch.float32), source, "cpu")
    addends = Addends(adapter.targets, adapter.module_weights(), adapter.spec.scale)
    embeddings, head = _tied_names(model)
    unties = embeddings is not None and any(target.group == "unembed" for target in adapter.targets)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, weight in files:
            to = dtype if dtype and weight.is_floating_point() else weight.dtype
            if unties and name == head:
                continue  # what some files have of a tied head is not read
            addend = addends.find(name)
            yield name, weight.to(to) if addend is None else addend.added_to(weight, to)
            if unties and name == embeddings and (addend := addends.find(head)):
                yield head, addend.added_to(weight, to)

    with written_aside(destination) as aside:
        _write_shards(aside, merged())
        if missing := addends.missing():
            raise CheckpointError(f"{base} has no weights of {missing[0]} by a name that is known")
        _copy_rest(base, aside)
        (aside / "config.json").write_text(json.dumps(_config(files, unties, dtype), indent=2) + "\n")
        os.sync()


def base_name(source: Path) -> str:
    """What the base model of an adapter's folder is called."""
    return read_json(source / CONFIG)["base_model_name_or_path"]


def _tied_names(model: "PreTrainedModel") -> tuple[str | None, str]:
    """Of the weights of embeddings and head in files; no embeddings where the head has its own."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, nn.Linear), "LoraTargets wants one"
    return names[embeddings] if head.weight is embeddings.weight else None, names[head]


def _config(files: BaseFiles, unties: bool, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's own, as far as it is still true."""
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    for part in (config, config.get("text_config", {})):
        if unties:
            part["tie_word_embeddings"] = False
        if dtype is not None:
            part.pop("torch_dtype", None)  # as it was called
            part["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """As transformers does: shards, and an index of them."""
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []
    size = total = 0

    def write() -> None:
        nonlocal size
        write_tensors(folder / f"{len(files)}.safetensors", shard)
        files.append(list(shard))
        shard.clear()
        size = 0

    for name, weight in weights:
        if shard and size + weight.nbytes > SHARD_BYTES:
            write()
        shard[name] = weight
        size, total = size + weight.nbytes, total + weight.nbytes
    write()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for i, name in enumerate(names):
        (folder / f"{i}.safetensors").rename(folder / name)
    weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_rest(base: Path, folder: Path) -> None:
    """Tokenizer, generation settings and the like."""
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED):
            shutil.copy(file, folder / file.name)
