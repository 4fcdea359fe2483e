"""A sweep: twenty runs, of four ranks at five learning rates each, that train AT ONCE on one service.

Nothing here packs or schedules: each run is a loop of its own, in a task of its own. The service lays the steps of all
runs that wait end to end, so that one forward and one backward of the base model serve many adapters. The runs are
in a project, and each says its rank and its rate in its metadata: so they can be found and compared later, and billed
together.

    python examples/sweep.py                   # a service of its own, on this machine
    python examples/sweep.py --address ...     # one that runs; the key is in LORRY_API_KEY
"""

import json
import time
from itertools import product
from typing import Annotated

import anyio
import typer
from rich import print as show
from rich.table import Table

import lorry

RANKS, LEARNING_RATES = (2, 4, 8, 16), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LESSON = """\
foo: n. The first name that comes to mind, and the last that should stay in a program.
bar: n. What comes after foo, and is as good a name.
baz: n. What comes after bar; whoever needs it needs a better idea.
lorry: n. A truck that carries many loads for one engine.
"""


async def train(
    service: lorry.ServiceClient, model: str, rank: int, learning_rate: float, steps: int, losses: dict[str, float]
) -> None:
    said = {"rank": str(rank), "learning_rate": f"{learning_rate:g}"}
    training = await service.create_lora_training_client_async(model, rank=rank, seed=1, user_metadata=said)
    tokenizer = await training.get_tokenizer_async()
    rows = [tokenizer.encode(line) for line in LESSON.splitlines()]
    data = [lorry.Datum(lorry.ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in rows]
    tokens = sum(len(row) - 1 for row in rows)
    for _ in range(steps):
        training.forward_backward(data, "cross_entropy")  # together with those of the other runs
        await training.optim_step(lorry.AdamParams(learning_rate=learning_rate))
    output = await training.forward(data, "cross_entropy")
    losses[training.model_id] = loss = output.metrics["loss:sum"] / tokens
    await training.log_metrics({"loss": loss}, steps)


async def sweep(service: lorry.ServiceClient, model: str, steps: int) -> None:
    losses: dict[str, float] = {}
    started = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for rank, learning_rate in product(RANKS, LEARNING_RATES):
            tasks.start_soon(train, service, model, rank, learning_rate, steps, losses)
    took_s = time.monotonic() - started

    runs = await service.create_rest_client().list_training_runs_async()
    ours = sorted((run for run in runs if run.training_run_id in losses), key=lambda run: losses[run.training_run_id])
    table = Table(title=f"The best five of {len(ours)} runs, after {took_s:.0f} s", title_justify="left")
    for column in ("run", "rank", "learning rate", "loss per token"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in ours[:5]:
        metadata, loss = run.user_metadata or {}, losses[run.training_run_id]
        table.add_row(run.training_run_id, metadata["rank"], metadata["learning_rate"], f"{loss:.3f}")
    show(table)
    best, worst = losses[ours[0].training_run_id], losses[ours[-1].training_run_id]
    print(json.dumps({"runs": len(ours), "loss": [best, worst], "best": ours[0].user_metadata}))


def main(
    address: Annotated[str | None, typer.Option(envvar="LORRY_ADDRESS", help="Of a service that runs")] = None,
    api_key: Annotated[str, typer.Option(envvar="LORRY_API_KEY")] = "",
    model: Annotated[str, typer.Option(help="As the service calls it")] = "jargon-1m",
    steps: int = 20,
    project: Annotated[str, typer.Option(help="Which the runs are in; it is made if new")] = "sweep",
) -> None:
    async def run() -> None:
        local = address is None
        connected = lorry.local(project=project) if local else lorry.connect(address, api_key=api_key, project=project)
        async with connected as service:
            await sweep(service, model, steps)

    anyio.run(run)


if __name__ == "__main__":
    typer.run(main)
