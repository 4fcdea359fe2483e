"""What users of tinker-cookbook write: its trainers, configured. Each runs in the cookbook's own environment, offline.

`python tests/cookbook/programs.py NAME FOLDER`, with TINKER_BASE_URL, TINKER_API_KEY and HF_HOME set. Prints what it
saw as a line of JSON. It imports nothing of Lorry's.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import chz
import tinker
from PIL import Image
from tinker_cookbook import checkpoint_utils, model_info, renderers, weights
from tinker_cookbook.image_processing_utils import get_image_processor
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder
from tinker_cookbook.supervised import train as supervised_train
from tinker_cookbook.supervised.common import datum_from_model_input_weights
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

MODEL = "Qwen/Qwen3-8B"
SEEING = "Qwen/Qwen3-VL-30B-A3B-Instruct"


def metrics(folder: Path, name: str) -> list[float]:
    """One value for each step, as the trainer logged it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


# Supervised ----------------------------------------------------------------------------------------------------------


def supervised(folder: Path) -> dict[str, Any]:
    """Three epochs; then five are asked for, and the trainer goes on from its last checkpoint by itself."""
    dataset = FromConversationFileBuilder(
        file_path=str(folder / "conversations.jsonl"),
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=MODEL,
            renderer_name=model_info.get_recommended_renderer_name(MODEL),
            max_length=256,
            batch_size=4,
        ),
    )

    def config(epochs: int) -> supervised_train.Config:
        return supervised_train.Config(
            log_path=str(folder / "log"),
            model_name=MODEL,
            recipe_name="test",
            renderer_name=model_info.get_recommended_renderer_name(MODEL),
            dataset_builder=dataset,
            learning_rate=5e-3,
            lr_schedule="constant",
            num_epochs=epochs,
            lora_rank=8,
            save_every=3,
            eval_every=0,
        )

    asyncio.run(supervised_train.main(config(3)))
    stopped_at = checkpoint_utils.get_last_checkpoint(str(folder / "log"))
    assert stopped_at is not None
    asyncio.run(supervised_train.main(config(5)))
    return {
        "stopped_at": [stopped_at.epoch, stopped_at.batch],
        "nll": metrics(folder / "log", "train_mean_nll"),
        "checkpoints": [record.name for record in checkpoint_utils.load_checkpoints_file(str(folder / "log"))],
    }


# Reinforcement -------------------------------------------------------------------------------------------------------


class VowelEnv(ProblemEnv):
    """Right is an answer with more vowels than the question asks for: a small model learns it in a few steps."""

    def __init__(self, vowels: int, renderer: renderers.Renderer) -> None:
        super().__init__(renderer, format_coef=0.0)
        self.vowels = vowels

    def get_question(self) -> str:
        return f"Write a line with {self.vowels} vowels or more."

    def check_answer(self, sample_str: str) -> bool:
        return sum(letter in "aeiou" for letter in sample_str.lower()) >= self.vowels

    def check_format(self, sample_str: str) -> bool:
        return True

    def get_reference_answer(self) -> str:
        return "a" * self.vowels


class VowelDataset(RLDataset):
    def __init__(self, renderer: renderers.Renderer, batches: int) -> None:
        self.renderer, self.batches = renderer, batches

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [ProblemGroupBuilder(partial(VowelEnv, vowels, self.renderer), num_envs=16) for vowels in (12, 14, 16)]

    def __len__(self) -> int:
        return self.batches


@chz.chz
class VowelDatasetBuilder(RLDatasetBuilder):
    renderer_name: str
    batches: int

    async def __call__(self) -> tuple[VowelDataset, None]:
        renderer = renderers.get_renderer(self.renderer_name, tokenizer=get_tokenizer(MODEL))
        return VowelDataset(renderer, self.batches), None


def reinforcement(folder: Path) -> dict[str, Any]:
    renderer_name = model_info.get_recommended_renderer_name(MODEL)
    config = rl_train.Config(
        learning_rate=5e-3,
        dataset_builder=VowelDatasetBuilder(renderer_name=renderer_name, batches=8),
        model_name=MODEL,
        recipe_name="test",
        renderer_name=renderer_name,
        max_tokens=12,
        log_path=str(folder / "log"),
        lora_rank=8,
        eval_every=0,
        save_every=4,
    )
    asyncio.run(rl_train.main(config))
    return {
        "rewards": metrics(folder / "log", "env/all/reward/total"),
        "checkpoints": [record.name for record in checkpoint_utils.load_checkpoints_file(str(folder / "log"))],
    }


# Checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> dict[str, Any]:
    """Saved, found again, resumed from, listed by the server; a rolling one is deleted when the next is made."""
    return asyncio.run(_checkpoints(str(folder)))


async def _checkpoints(folder: str) -> dict[str, Any]:
    service = tinker.ServiceClient()
    metadata: dict[str, str] = {}
    checkpoint_utils.add_renderer_name_to_user_metadata(metadata, "qwen3")
    training = await service.create_lora_training_client_async(MODEL, rank=4, seed=3, user_metadata=metadata)
    tokens = get_tokenizer(MODEL).encode("The carrier signs the bill of lading.")
    await step(training, tokens)
    saved = await checkpoint_utils.save_checkpoint_async(
        training, "one", folder, {"batch": 1, "note": "x"}, kind="both"
    )
    found = checkpoint_utils.get_last_checkpoint(folder)
    assert found is not None and found.state_path is not None
    resumed = await service.create_training_client_from_state_with_optimizer_async(found.state_path)

    manager = checkpoint_utils.CheckpointManager(training, service, folder, save_every=0, rolling_save_every=1)
    went_on: list[float] = []
    for number in range(2, 5):
        went_on.append(await step(training, tokens))
        await manager.maybe_save_async(number, {"batch": number})
    await manager.save_final_async({"batch": 4})
    listed = await service.create_rest_client().list_checkpoints_async(training.model_id)
    sampler = await service.create_sampling_client_async(base_model=MODEL)
    return {
        "tokenizers_agree": sampler.get_tokenizer().encode("cargo") == training.get_tokenizer().encode("cargo"),
        "paths": [saved["state_path"], saved["sampler_path"]],
        "found": [found.batch, found.get("note"), found.state_path],
        "renderer": await checkpoint_utils.get_renderer_name_from_checkpoint_async(service, found.state_path),
        "went_on": went_on,
        "resumed": [await step(resumed, tokens) for _ in went_on],
        "listed": [checkpoint.tinker_path for checkpoint in listed.checkpoints],
    }


async def step(training: tinker.TrainingClient, tokens: list[int]) -> float:
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32"),
        },
    )
    passed = await training.forward_backward_async([datum], "cross_entropy")
    stepped = await training.optim_step_async(tinker.AdamParams(learning_rate=5e-3))
    loss = (await passed).metrics["loss:sum"]
    await stepped
    return loss


# Images --------------------------------------------------------------------------------------------------------------


def seen(folder: Path) -> dict[str, Any]:
    """A conversation about each image in FOLDER, trained on and sampled from; tokens as the renderer counts them."""
    return asyncio.run(_seen(sorted(folder.glob("*.png"))))


async def _seen(files: list[Path]) -> dict[str, Any]:
    renderer = renderers.get_renderer(
        model_info.get_recommended_renderer_name(SEEING), get_tokenizer(SEEING), get_image_processor(SEEING)
    )
    service = tinker.ServiceClient()
    training = await service.create_lora_training_client_async(base_model=SEEING, rank=4, seed=1)
    sampler = await service.create_sampling_client_async(base_model=SEEING)
    params = tinker.SamplingParams(max_tokens=2)
    counts: dict[str, int] = {}
    data: list[tinker.Datum] = []
    for file in files:
        image: Any = {"type": "image", "image": Image.open(file)}
        question: Any = {"role": "user", "content": [image, {"type": "text", "text": "What is that?"}]}
        prompt = renderer.build_generation_prompt([question])
        counts[file.name] = sum(c.expected_tokens for c in prompt.chunks if isinstance(c, tinker.types.ImageChunk))
        assert len((await sampler.sample_async(prompt, 1, params)).sequences[0].tokens) > 0
        tokens, weights_ = renderer.build_supervised_example([question, {"role": "assistant", "content": "A lorry."}])
        data.append(datum_from_model_input_weights(tokens, weights_))
    losses: list[float] = []
    for _ in range(4):
        losses.append((await (await training.forward_backward_async(data, "cross_entropy"))).metrics["loss:sum"])
        await (await training.optim_step_async(tinker.AdamParams(learning_rate=5e-3)))
    return {"counts": counts, "losses": losses}


# Weights -------------------------------------------------------------------------------------------------------------


def merge(folder: Path) -> dict[str, Any]:
    """FOLDER/base and FOLDER/adapter as one model, FOLDER/merged."""
    weights.build_hf_model(
        base_model=str(folder / "base"), adapter_path=str(folder / "adapter"), output_path=str(folder / "merged")
    )
    return {}


def convert(folder: Path) -> dict[str, Any]:
    """FOLDER/adapter as PEFT's for servers, FOLDER/converted."""
    weights.build_lora_adapter(
        base_model=str(folder / "base"), adapter_path=str(folder / "adapter"), output_path=str(folder / "converted")
    )
    return {}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))), flush=True)
    os._exit(0)  # the SDK's background threads do not stop at the end
