"""Two tenants share one base model: each trains a LoRA adapter of its own, at the same time, on this machine.

Alice does supervised learning: her adapter of rank 8 picks up the language of Lorry's licence.
Bob does reinforcement learning: his, of rank 4, is rewarded, in this very file, for words without the letter e.
Then both sample, save and reload, and the bill is printed. `lorry demo` runs it.
"""

import re
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import lorry
from lorry.config import DEMO_SETTINGS, ServeConfig, demo_model
from lorry.serve import Deployment, serving

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = demo_model().name
NEXT = """
That was a broker, an actor and two clients, in processes of this machine that are gone now. To go on:

  lorry serve --demo     serves the same model until Ctrl-C, prints a key, and has a console in the browser
                         at http://127.0.0.1:8000/console
  lorry serve --model NAME=FOLDER_OR_HUB_ID     serves one of yours
  lorry --help           lists what else there is; the README and docs/ say more, examples/ has training loops"""
console = Console()


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lorry-demo-") as data:
        config = ServeConfig(
            (demo_model(),), Path(data), bind="tcp://127.0.0.1:*", actor=DEMO_SETTINGS, log_level="warning"
        )
        with console.status("Starting the broker and an actor…") as status:
            async with serving(config) as deployment:
                status.stop()
                await show(deployment)
    console.print(NEXT, highlight=False, soft_wrap=True)


async def show(deployment: Deployment) -> None:
    alice_key, bob_key = await deployment.create_key("alice"), await deployment.create_key("bob")
    async with (
        lorry.connect(deployment.address, api_key=alice_key) as alice,
        lorry.connect(deployment.address, api_key=bob_key) as bob,
    ):
        with Progress(
            TextColumn("{task.description:24}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(supervised, alice, progress, progress.add_task("alice, supervised", note=""))
                tasks.start_soon(reinforcement, bob, progress, progress.add_task("bob, reinforcement", note=""))
        await bill(alice, bob)


async def supervised(service: lorry.ServiceClient, progress: Progress, task: TaskID, steps: int = 30) -> None:
    training = await service.create_lora_training_client_async(MODEL, rank=8, seed=1)
    tokenizer = await training.get_tokenizer_async()
    tokens = tokenizer.encode(licence())
    rows = [tokens[i : i + 129] for i in range(0, len(tokens) - 129, 128)]
    data = [
        lorry.Datum(lorry.ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:], "weights": [1.0] * 128})
        for row in rows
    ]
    progress.update(task, total=steps)
    for step in range(steps):
        batch = [data[(8 * step + i) % len(data)] for i in range(8)]
        backward = training.forward_backward(batch, "cross_entropy")
        await training.optim_step(lorry.AdamParams(learning_rate=3e-3))
        loss = (await backward).metrics["loss:sum"] / (8 * 128)
        progress.update(task, advance=1, note=f"loss {loss:.2f} per token")

    saved = await training.save_state("after-30-steps")
    before = (await training.forward(data[:4], "cross_entropy")).metrics["loss:sum"]
    resumed = await service.create_lora_training_client_async(MODEL, rank=8, seed=2)
    await resumed.load_state_with_optimizer(saved.path)
    after = (await resumed.forward(data[:4], "cross_entropy")).metrics["loss:sum"]
    assert abs(after - before) <= 1e-4 * before, (before, after)
    console.print(f"[b]alice[/] saved {saved.path} and resumed it in another run: loss {after:.2f}, was {before:.2f}")
    await compare("alice", service, await resumed.save_weights_and_get_sampling_client_async("legal"), tokenizer)


def licence() -> str:
    """As it was installed. In a clone Python may find the metadata of the build first, which has none."""
    found = (distribution.read_text("licenses/LICENSE") for distribution in distributions(name="lorry"))
    return next(text for text in found if text)


async def reinforcement(
    service: lorry.ServiceClient, progress: Progress, task: TaskID, steps: int = 40, group: int = 32
) -> None:
    training = await service.create_lora_training_client_async(MODEL, rank=4, seed=3, train_unembed=False)
    tokenizer = await training.get_tokenizer_async()
    prompt = tokenizer.encode("hacker: n.\n")
    params = lorry.SamplingParams(max_tokens=40, temperature=1.0)
    progress.update(task, total=steps)
    means: list[float] = []
    for _ in range(steps):
        sampler = await training.save_weights_and_get_sampling_client_async()
        samples = (await sampler.sample_async(lorry.ModelInput.from_ints(prompt), group, params)).sequences
        rewards = [without_e(str(tokenizer.decode(sample.tokens))) for sample in samples]
        means.append(mean := sum(rewards) / group)
        data = [policy_datum(prompt, sample, reward - mean) for sample, reward in zip(samples, rewards, strict=True)]
        training.forward_backward(data, "importance_sampling")
        await training.optim_step(lorry.AdamParams(learning_rate=1e-3))
        progress.update(task, advance=1, note=f"reward {mean:.2f}")
    console.print(f"[b]bob[/]'s reward rose from {means[0]:.2f} to {means[-1]:.2f}")
    await compare("bob", service, await training.save_weights_and_get_sampling_client_async("no-e"), tokenizer)


def without_e(text: str) -> float:
    """The reward: different words without the letter e, as a share of all words (of eight, if there are fewer)."""
    words = re.findall(r"[a-z]{2,}", text.lower())
    return len({word for word in words if "e" not in word}) / max(8, len(words))


def policy_datum(prompt: list[int], sample: lorry.SampledSequence, advantage: float) -> lorry.Datum:
    """Position i of the input predicts token i + 1; only what was sampled has an advantage."""
    tokens, quiet = prompt + sample.tokens, [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": quiet + sample.logprobs,
        "advantages": quiet + [advantage] * len(sample.tokens),
    }
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), inputs)


async def compare(
    tenant: str, service: lorry.ServiceClient, adapter: lorry.SamplingClient, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    base = await service.create_sampling_client_async(base_model=MODEL)
    prompt = lorry.ModelInput.from_ints(tokenizer.encode("hacker: n.\n"))
    params = lorry.SamplingParams(max_tokens=60, temperature=0.7, seed=7)
    for name, sampler in (("the base model", base), (f"{tenant}'s adapter", adapter)):
        text = str(tokenizer.decode((await sampler.sample_async(prompt, 1, params)).sequences[0].tokens))
        console.print(f"[b]{name}[/] says: {escape(' '.join(text.split()))}", highlight=False)


async def bill(*services: lorry.ServiceClient) -> None:
    table = Table(title="Tokens", title_justify="left")
    for column in ("tenant", "run", "kind"):
        table.add_column(column)
    table.add_column("tokens", justify="right")
    for service in services:
        for row in await service.create_rest_client().get_usage_async():
            table.add_row(row.tenant, row.run or "(base model)", row.kind, f"{row.tokens:,}")
    console.print(table)
