"""DPO: direct preference optimisation, with its loss written here and run on the logprobs that the service sends.

What is preferred is told by a rule of this file: of two definitions that the base model writes, the one with fewer
letters e. The reference is the adapter as it starts, which changes nothing yet. An eighth of the pairs is held out,
and the margin of the chosen over the rejected is measured on those.

    python examples/dpo.py                   # a service of its own, on this machine
    python examples/dpo.py --address ...     # one that runs; the key is in LORRY_API_KEY
"""

import json
import random
import re
from collections.abc import Sequence
from typing import Annotated

import anyio
import torch
import typer
from rich import print as show
from torch.nn.functional import logsigmoid

import lorry

WORDS = re.findall(
    r"\w+",
    """arena bogus bug cookie core crash daemon demon dump elegant flame grok hack hacker hang hash kernel kluge lamer
    macro magic nybble patch phreaking root shell spam stack token vi wizard zombie""",
)
Pair = tuple[lorry.Datum, lorry.Datum]
"""The chosen one, and the rejected."""


def share_of_e(text: str) -> float:
    return text.count("e") / max(1, len(text))


async def make_pairs(service: lorry.ServiceClient, model: str, of_each_word: int) -> list[Pair]:
    sampler = await service.create_sampling_client_async(base_model=model)
    tokenizer = await sampler.get_tokenizer_async()
    params = lorry.SamplingParams(max_tokens=24, temperature=1.0, seed=1)
    prompts = [lorry.ModelInput.from_ints(tokenizer.encode(f"{word}: n.")) for word in WORDS]
    futures = [sampler.sample(prompt, 4 * of_each_word, params) for prompt in prompts]  # all under way at once
    pairs: list[Pair] = []
    for prompt, future in zip(prompts, futures, strict=True):
        samples = sorted((await future).sequences, key=lambda sample: share_of_e(tokenizer.decode(sample.tokens)))
        best, worst = samples[:of_each_word], samples[-of_each_word:]
        pairs += [(datum(prompt, a), datum(prompt, b)) for a, b in zip(best, worst, strict=True)]
    return pairs


def datum(prompt: lorry.ModelInput, sample: lorry.SampledSequence) -> lorry.Datum:
    tokens, quiet = prompt.to_ints() + sample.tokens, [0.0] * (prompt.length - 1)
    inputs = {"target_tokens": tokens[1:], "weights": quiet + [1.0] * len(sample.tokens)}
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), inputs)


async def train(service: lorry.ServiceClient, model: str, steps: int, batch: int, beta: float) -> None:
    pairs = await make_pairs(service, model, of_each_word=8)
    random.Random(1).shuffle(pairs)
    training = await service.create_lora_training_client_async(model, rank=16, seed=1)

    async def logprobs(pairs: Sequence[Pair]) -> list[float]:
        """Of each answer: of a pair's chosen, of its rejected, of the next pair's chosen, ..."""
        data = [one for pair in pairs for one in pair]
        output = await training.forward(data, "cross_entropy")
        rows = zip(data, output.loss_fn_outputs, strict=True)
        return [float(row["logprobs"].to_numpy() @ one.loss_fn_inputs["weights"].to_numpy()) for one, row in rows]

    reference = await logprobs(pairs)  # before the first step: the weights are the base model's

    def margins(of_answers: torch.Tensor, first: int) -> torch.Tensor:
        """By how much more than the reference each chosen is preferred, from pair `first` on."""
        ratios = of_answers - torch.tensor(reference[2 * first : 2 * first + len(of_answers)])
        return ratios[::2] - ratios[1::2]

    held_out = len(pairs) - len(pairs) // 8
    for step in range(steps):
        first = step * batch % (held_out - batch + 1)

        def loss(
            data: list[lorry.Datum], rows: list[torch.Tensor], first: int = first
        ) -> tuple[torch.Tensor, dict[str, float]]:
            of_answers = [row @ one.loss_fn_inputs["weights"].to_torch() for one, row in zip(data, rows, strict=True)]
            margin = margins(torch.stack(of_answers), first)
            return -logsigmoid(beta * margin).mean(), {"margin": margin.mean().item()}

        data = [one for pair in pairs[first : first + batch] for one in pair]
        backward = await training.forward_backward_custom_async(data, loss)
        await training.optim_step(lorry.AdamParams(learning_rate=1e-3))
        of_batch = (await backward).metrics["margin"]
        training.log_metrics({"margin": of_batch}, step)
        show(f"step {step:3}  margin {of_batch:6.2f}")

    margin = margins(torch.tensor(await logprobs(pairs[held_out:])), held_out)
    preferred = (margin > 0).float().mean().item()
    show(f"pairs that it never saw: the mean margin is {margin.mean():.2f}, was 0; {preferred:.0%} are told right")
    print(json.dumps({"margin": [0.0, margin.mean().item()], "accuracy": preferred}))


def main(
    address: Annotated[str | None, typer.Option(envvar="LORRY_ADDRESS", help="Of a service that runs")] = None,
    api_key: Annotated[str, typer.Option(envvar="LORRY_API_KEY")] = "",
    model: Annotated[str, typer.Option(help="As the service calls it")] = "jargon-1m",
    steps: int = 28,
    batch: Annotated[int, typer.Option(help="Pairs in each step")] = 32,
    beta: Annotated[float, typer.Option(help="How much a margin counts")] = 0.1,
) -> None:
    async def run() -> None:
        async with lorry.connect(address, api_key=api_key) if address else lorry.local() as service:
            await train(service, model, steps, batch, beta)

    anyio.run(run)


if __name__ == "__main__":
    typer.run(main)
