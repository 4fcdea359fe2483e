"""What it costs a reinforcement loop to sample from its newest weights: a step that saves weights without a name and
samples from them, over one that samples from the same weights as ever.

Rank 32 on the 40 M parameter model of `bench/engine.py`, through client, broker and actor: 16 sequences of 64 tokens,
then a forward_backward of them and a step. Steps of both kinds take turns. Prints what a step takes, the ratio, and how
many folders of weights are there at the end, with a JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
from rich.console import Console
from rich.table import Table

import lorry
from bench.end_to_end import save_model
from bench.engine import ratios
from bench.goals import at_most, settle
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving
from lorry.wire.model_input import ModelInput
from lorry.wire.types import AdamParams, Datum, SampleResponse, SamplingParams

GOAL = 1.15
PROMPT = ModelInput.from_ints(list(range(1, 33)))
PARAMS = SamplingParams(max_tokens=64, stop=[])
SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Result:
    """Milliseconds a step, the median and quartiles of the ratio, and what is on disk after so many steps."""

    steps: int
    same_ms: float
    newest_ms: float
    newest_over_same: tuple[float, float, float]
    folders: int


async def step(training: lorry.TrainingClient, sampler: lorry.SamplingClient | None) -> float:
    """How many milliseconds it took. Without a sampler it makes one of the weights as they are."""
    started = time.perf_counter()
    if sampler is None:
        sampler = await training.save_weights_and_get_sampling_client_async()
    response = await sampler.sample_async(PROMPT, SEQUENCES, PARAMS)
    backward = training.forward_backward(data_of(response), "importance_sampling")
    await training.optim_step(AdamParams(learning_rate=1e-4))
    await backward
    return 1e3 * (time.perf_counter() - started)


def data_of(response: SampleResponse) -> list[Datum]:
    before = PROMPT.to_ints()
    data: list[Datum] = []
    for sequence in response.sequences:
        tokens, zeros = [*before, *sequence.tokens], [0.0] * (len(before) - 1)
        inputs = {
            "target_tokens": tokens[1:],
            "logprobs": [*zeros, *sequence.logprobs],
            "advantages": [*zeros, *[1.0] * len(sequence.tokens)],
        }
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))  # type: ignore[arg-type]
    return data


async def measure(folder: Path, data: Path, steps: int) -> Result:
    config = ServeConfig((ModelConfig("bench", str(folder)),), data, bind="tcp://127.0.0.1:*", log_level="warning")
    async with serving(config) as deployment:
        key = await deployment.create_key("bench")
        async with lorry.connect(deployment.address, api_key=key) as service:
            training = await service.create_lora_training_client_async("bench", rank=32, seed=1)
            same = await training.save_weights_and_get_sampling_client_async()
            times: dict[str, list[float]] = {"same": [], "newest": []}
            for turn in range(steps + 1):
                same_ms, newest_ms = await step(training, same), await step(training, None)
                if turn > 0:  # the first warms up
                    times["same"].append(same_ms)
                    times["newest"].append(newest_ms)
            there = data / "checkpoints" / training.model_id / "sampler_weights"
            same_ms, newest_ms = (statistics.median(times[name]) for name in ("same", "newest"))
            folders = len(list(there.iterdir()))
            return Result(steps, same_ms, newest_ms, ratios(times["newest"], times["same"]), folders)


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="of each kind")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        result = anyio.run(measure, folder, Path(temporary) / "data", options.steps)
    middle, low, high = result.newest_over_same
    table = Table("same weights ms", "newest weights ms", "newest / same", "folders", title="a step of a loop")
    times = (f"{ms:.0f}" for ms in (result.same_ms, result.newest_ms))
    table.add_row(*times, f"{middle:.2f} ({low:.2f} to {high:.2f})", str(result.folders))
    Console().print(table)
    print(json.dumps({"bench": "loops", "result": asdict(result)}))
    return at_most("a step with new weights, over one without", middle, GOAL)


if __name__ == "__main__":
    settle(main())
