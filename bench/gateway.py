"""What HTTP costs: an 8-token forward_backward through the official SDK and a gateway, over the native client's.

`python bench/gateway.py`: both take turns on one server, request by request, so that the machine's moods hit both.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lorry
from lorry.config import ModelConfig, ServeConfig
from lorry.serve import serving

ROOT = Path(__file__).resolve().parent.parent
MODEL = "jargon-1m"
TOKENS = [5, 6, 7, 8, 9, 10, 11, 12]
WARM_UP, ROUNDS = 20, 200


async def main() -> None:
    with tempfile.TemporaryDirectory() as data:
        config = ServeConfig(
            models=(ModelConfig(MODEL, str(ROOT / "tests/assets/base-model")),),
            data=Path(data),
            bind="tcp://127.0.0.1:*",
            http="127.0.0.1:0",
            log_level="warning",
        )
        async with serving(config) as deployment:
            key = await deployment.create_key("bench")
            os.environ |= {"TINKER_BASE_URL": deployment.url or "", "TINKER_API_KEY": key}
            async with lorry.connect(deployment.address, api_key=key) as service:
                native, http = await measure(service)
    report(native, http)


async def measure(service: lorry.ServiceClient) -> tuple[list[float], list[float]]:
    """Milliseconds of each request, from the call to its result."""
    native_run = await service.create_lora_training_client_async(MODEL, rank=8, seed=1)
    targets = lorry.TensorData([*TOKENS[1:], 13])
    datum = lorry.Datum(lorry.ModelInput.from_ints(TOKENS), {"target_tokens": targets})
    through_http = await asyncio.to_thread(sdk_pass)
    native: list[float] = []
    http: list[float] = []
    for _ in range(WARM_UP + ROUNDS):
        started = time.perf_counter()
        await (await native_run.forward_backward_async([datum], "cross_entropy"))
        native.append(1e3 * (time.perf_counter() - started))
        started = time.perf_counter()
        await asyncio.to_thread(through_http)
        http.append(1e3 * (time.perf_counter() - started))
    return native[WARM_UP:], http[WARM_UP:]


def sdk_pass():  # noqa: ANN201 - the SDK is imported only here
    """A function that makes one pass through the SDK, as a script would."""
    import tinker
    from tinker import types

    training = tinker.ServiceClient().create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[*TOKENS[1:], 13], dtype="int64")},
    )
    return lambda: training.forward_backward([datum], "cross_entropy").result()


def report(native: list[float], http: list[float]) -> None:
    ratio = statistics.median(http) / statistics.median(native)
    table = Table("forward_backward of 8 tokens", "median ms", "90 % below, ms")
    for name, times in (("native client", native), ("official SDK over HTTP", http)):
        table.add_row(name, f"{statistics.median(times):.2f}", f"{statistics.quantiles(times, n=10)[-1]:.2f}")
    Console(stderr=True).print(table, f"ratio of the medians: {ratio:.2f}")
    figures = {"native_ms": statistics.median(native), "http_ms": statistics.median(http), "ratio": ratio}
    json.dump({name: round(value, 3) for name, value in figures.items()}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
