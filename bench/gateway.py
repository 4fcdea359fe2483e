"""What HTTP costs: an 8-token forward_backward through the official SDK and a gateway, over the native client's.

Both take turns on one server, request by request, so that the machine's moods hit both. The actor computes with one
thread, as in the demo and the tests: it is the fastest for so small a model, and with more, the SDK's own work and the
pass would be measured while they fight for a small machine's cores. Prints a table and a JSON line.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
from anyio import to_thread
from rich.console import Console
from rich.table import Table

import lorry
from bench.goals import at_most, settle
from lorry.actors.config import ActorSettings
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving

GOAL = 1.5
BASE_MODEL = Path(__file__).resolve().parent.parent / "tests/assets/base-model"
MODEL = "jargon-1m"
TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]
TARGETS = [*TOKENS[1:], 13]
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Result:
    """Medians in milliseconds, and the median and quartiles of the ratio of neighbours."""

    native_ms: float
    http_ms: float
    http_over_native: float
    quartiles: tuple[float, float]


async def measure(data: Path, threads: int, rounds: int) -> Result:
    config = ServeConfig(
        models=(ModelConfig(MODEL, str(BASE_MODEL)),),
        data=data,
        bind="tcp://127.0.0.1:*",
        http="127.0.0.1:0",
        actor=ActorSettings(threads=threads),
        log_level="warning",
    )
    async with serving(config) as deployment:
        key = await deployment.create_key("bench")
        os.environ |= {"TINKER_BASE_URL": deployment.url or "", "TINKER_API_KEY": key}
        async with lorry.connect(deployment.address, api_key=key) as service:
            native_run = await service.create_lora_training_client_async(MODEL, rank=8, seed=1)
            return await take_turns(native_run, await to_thread.run_sync(sdk_pass), rounds)


async def take_turns(native_run: lorry.TrainingClient, through_http: Callable[[], object], rounds: int) -> Result:
    datum = lorry.Datum(lorry.ModelInput.from_ints(TOKENS), {"target_tokens": lorry.TensorData(TARGETS)})
    native: list[float] = []
    http: list[float] = []
    for _ in range(WARM_UP + rounds):
        started = time.perf_counter()
        await (await native_run.forward_backward_async([datum], "cross_entropy"))
        native.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
        await to_thread.run_sync(through_http)
        http.append(1e3 * (time.perf_counter() - started))
    native, http = native[WARM_UP:], http[WARM_UP:]
    native_ms, http_ms = statistics.median(native), statistics.median(http)
    low, _, high = statistics.quantiles((h / n for h, n in zip(http, native, strict=True)), n=4)
    return Result(native_ms, http_ms, http_ms / native_ms, (low, high))


def sdk_pass() -> Callable[[], object]:
    """A function that makes one pass through the SDK, as a script would."""
    import tinker  # slow to import, and only this needs it
    from tinker import types

    training = tinker.ServiceClient().create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS),
        loss_fn_inputs={"target_tokens": types.TensorData(data=TARGETS, dtype="int64")},
    )
    return lambda: training.forward_backward([datum], "cross_entropy").result()


def main(arguments: list[str] | None = None) -> list[str]:
    """Returns the goals that were missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of the actor")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as data:
        result = anyio.run(measure, Path(data), options.threads, options.rounds)
    table = Table(
        "native client ms", "official SDK over HTTP ms", "HTTP / native", title="forward_backward of 8 tokens"
    )
    low, high = result.quartiles
    times = (f"{ms:.1f}" for ms in (result.native_ms, result.http_ms))
    table.add_row(*times, f"{result.http_over_native:.2f} ({low:.2f} to {high:.2f})")
    Console().print(table)
    print(json.dumps({"bench": "gateway", "threads": options.threads, "result": asdict(result)}))
    return at_most("the SDK over HTTP, over the native client", result.http_over_native, GOAL)


if __name__ == "__main__":
    settle(main())
