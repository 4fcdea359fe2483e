"""Scripts that show images to a model."""

from pathlib import Path
from typing import Any

import tinker
from tinker import types

from tests.actors.hostile import hostile, usual

from .shared import ready

MODEL = "seeing"
START, END = 92, 93


def _input(image: types.ImageChunk, after: list[int]) -> types.ModelInput:
    text = types.EncodedTextChunk
    return types.ModelInput(chunks=[text(tokens=[1, 2, START]), image, text(tokens=[END, *after])])


def _row(image: types.ImageChunk, tokens: int) -> types.Datum:
    """The last three targets count."""
    targets = [0] * (tokens + 3) + [7, 8, 9]
    weights = [0.0] * (tokens + 3) + [1.0] * 3
    return types.Datum(
        model_input=_input(image, [7, 8]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=targets, dtype="int64", shape=[len(targets)]),
            "weights": types.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
        },
    )


def shown(folder: str) -> dict[str, Any]:
    """An image of each file in `folder`, whose names begin with how many tokens they are: forward, steps, samples."""
    service = tinker.ServiceClient()
    training = ready(service.create_lora_training_client(base_model=MODEL, rank=4, seed=7))
    rows, prompts = [], []
    for file in sorted(Path(folder).iterdir()):
        tokens, format = int(file.name.partition("-")[0]), "png" if file.suffix == ".png" else "jpeg"
        rows.append(_row(types.ImageChunk(data=file.read_bytes(), format=format, expected_tokens=tokens), tokens))
        prompts.append(_input(types.ImageChunk(data=file.read_bytes(), format=format), [7, 8]))
    first = training.forward(rows, "cross_entropy").result()
    losses: list[float] = []
    for _ in range(4):
        losses.append(training.forward_backward(rows, "cross_entropy").result().metrics["loss:sum"])
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    base = ready(service.create_sampling_client(base_model=MODEL))
    params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    sampled = [base.sample(p, 1, params, include_prompt_logprobs=True).result() for p in prompts]
    return {
        "model_id": training.model_id,
        "logprobs": [output["logprobs"].tolist() for output in first.loss_fn_outputs],
        "losses": losses,
        "tokens": [list(one.sequences[0].tokens) for one in sampled],
        "prompt_logprobs": [list(one.prompt_logprobs) for one in sampled],
        "scored": base.compute_logprobs(prompts[0]).result(),
    }


def refused() -> dict[str, Any]:
    """Every hostile file in a row and in a prompt, each followed by a right one; and an image by its address."""
    service = tinker.ServiceClient()
    training = ready(service.create_lora_training_client(base_model=MODEL, rank=4, seed=7))
    base = ready(service.create_sampling_client(base_model=MODEL))
    good = types.ImageChunk(data=usual(), format="png")
    params = types.SamplingParams(max_tokens=2, seed=3, stop=[])
    said: dict[str, list[str]] = {}
    after: list[float] = []
    sampled: list[list[int]] = []
    for one in hostile():
        chunk = types.ImageChunk(data=one.data, format=one.format, expected_tokens=one.expected_tokens)  # type: ignore
        row = _row(chunk, one.expected_tokens or 16)
        said[one.name] = [
            _refusal(training.forward_backward, [row], "cross_entropy"),
            _refusal(base.sample, _input(chunk, [7]), 1, params),
        ]
        after.append(training.forward([_row(good, 16)], "cross_entropy").result().metrics["loss:sum"])
        sampled.append(list(base.sample(_input(good, [7]), 1, params).result().sequences[0].tokens))
    pointer: Any = types.ImageAssetPointerChunk(format="png", location="file:///etc/passwd", expected_tokens=16)
    pointed = _refusal(base.sample, _input(pointer, [7]), 1, params)
    sampled.append(list(base.sample(_input(good, [7]), 1, params).result().sequences[0].tokens))
    return {"said": said, "after": after, "sampled": sampled, "pointed": pointed}


def _refusal(call: Any, *arguments: object) -> str:
    try:
        call(*arguments).result()
    except tinker.TinkerError as error:
        return str(error)
    return "not refused"
