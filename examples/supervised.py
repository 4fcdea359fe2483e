"""Supervised fine-tuning: a base model that knows no numbers learns to tell odd ones from even ones.

Only the answer is trained: the tokens of the question have weight 0. A tenth of the numbers is held out, and what the
adapter answers to those is sampled before and after.

    python examples/supervised.py                   # a service of its own, on this machine
    python examples/supervised.py --address ...     # one that runs; the key is in LORRY_API_KEY
"""

import json
import random
from typing import Annotated

import anyio
import typer
from rich import print as show

import lorry


def question(number: int) -> str:
    return f"The number {number} is"


def answer(number: int) -> str:
    return " even." if number % 2 == 0 else " odd."


async def train(service: lorry.ServiceClient, model: str, steps: int, batch: int, learning_rate: float) -> None:
    training = await service.create_lora_training_client_async(model, rank=16, seed=1)
    tokenizer = await training.get_tokenizer_async()

    def datum(number: int) -> lorry.Datum:
        asked, told = tokenizer.encode(question(number)), tokenizer.encode(answer(number))
        tokens, weights = asked + told, [0.0] * (len(asked) - 1) + [1.0] * len(told)
        inputs = {"target_tokens": tokens[1:], "weights": weights}  # position i predicts token i + 1
        return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), inputs)

    async def accuracy() -> float:
        sampler = await training.save_weights_and_get_sampling_client_async()
        params = lorry.SamplingParams(max_tokens=4, temperature=0)
        prompts = [lorry.ModelInput.from_ints(tokenizer.encode(question(number))) for number in held_out]
        futures = [sampler.sample(prompt, 1, params) for prompt in prompts]  # all under way at once
        texts = [tokenizer.decode((await future).sequences[0].tokens) for future in futures]
        right = [text.startswith(answer(number)) for text, number in zip(texts, held_out, strict=True)]
        return sum(right) / len(right)

    numbers = list(range(100, 1000))
    random.Random(1).shuffle(numbers)
    held_out, numbers = numbers[:90], numbers[90:]
    before, losses = await accuracy(), []
    for step in range(steps):
        chosen = [numbers[(step * batch + i) % len(numbers)] for i in range(batch)]
        backward = training.forward_backward([datum(number) for number in chosen], "cross_entropy")
        await training.optim_step(lorry.AdamParams(learning_rate=learning_rate))
        losses.append((await backward).metrics["loss:sum"] / batch)
        training.log_metrics({"loss": losses[-1]}, step)
        show(f"step {step:3}  loss {losses[-1]:.3f} per answer")
    after = await accuracy()
    await training.log_metrics({"accuracy": after}, steps)
    show(f"right about numbers that it never saw: {before:.0%} before, {after:.0%} after")
    print(json.dumps({"loss": [losses[0], losses[-1]], "accuracy": [before, after]}))


def main(
    address: Annotated[str | None, typer.Option(envvar="LORRY_ADDRESS", help="Of a service that runs")] = None,
    api_key: Annotated[str, typer.Option(envvar="LORRY_API_KEY")] = "",
    model: Annotated[str, typer.Option(help="As the service calls it")] = "jargon-1m",
    steps: int = 40,
    batch: int = 32,
    learning_rate: float = 5e-3,
) -> None:
    async def run() -> None:
        async with lorry.connect(address, api_key=api_key) if address else lorry.local() as service:
            await train(service, model, steps, batch, learning_rate)

    anyio.run(run)


if __name__ == "__main__":
    typer.run(main)
