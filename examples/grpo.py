"""GRPO: reinforcement learning with group-relative advantages, for sums of two digits.

The reward is computed here, in the client: 1 for the right sum, else 0. A base model that has never seen a sum would
never be rewarded, so some supervised steps come first, after which it knows what an answer looks like, and is often
wrong. Then each step samples a group of answers to each question, and what is better than its group's mean is made
more probable, as much as it is better.

    python examples/grpo.py                   # a service of its own, on this machine
    python examples/grpo.py --address ...     # one that runs; the key is in LORRY_API_KEY
"""

import json
import random
from statistics import fmean
from typing import Annotated

import anyio
import typer
from rich import print as show

import lorry

SUMS = [(a, b) for a in range(10) for b in range(10)]


async def train(
    service: lorry.ServiceClient, model: str, warm_steps: int, steps: int, questions: int, group: int
) -> None:
    training = await service.create_lora_training_client_async(model, rank=16, seed=1)
    tokenizer = await training.get_tokenizer_async()
    draw = random.Random(1)
    (newline,) = tokenizer.encode("\n")

    def encoded(a: int, b: int) -> list[int]:
        return tokenizer.encode(f"{a}+{b}=")

    for _ in range(warm_steps):
        data = []
        for a, b in draw.sample(SUMS, 32):
            asked, told = encoded(a, b), tokenizer.encode(f"{a + b}\n")
            tokens, weights = asked + told, [0.0] * (len(asked) - 1) + [1.0] * len(told)
            datum = lorry.Datum(
                lorry.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights}
            )
            data.append(datum)
        training.forward_backward(data, "cross_entropy")
        await training.optim_step(lorry.AdamParams(learning_rate=3e-3))

    rewards_of_steps: list[float] = []
    for step in range(steps):
        sampler = await training.save_weights_and_get_sampling_client_async()
        params = lorry.SamplingParams(max_tokens=4, temperature=1.0, stop=[newline], seed=step)
        asked = draw.sample(SUMS, questions)
        prompts = [lorry.ModelInput.from_ints(encoded(a, b)) for a, b in asked]
        futures = [sampler.sample(prompt, group, params) for prompt in prompts]  # all under way at once
        data, rewards_of_step = [], []
        for (a, b), prompt, future in zip(asked, prompts, futures, strict=True):
            samples = (await future).sequences
            rewards = [float(tokenizer.decode(sample.tokens).strip() == str(a + b)) for sample in samples]
            advantages = [reward - fmean(rewards) for reward in rewards]
            rewards_of_step += rewards
            if any(advantages):  # a group that was all right, or all wrong, teaches nothing
                data += [policy_datum(prompt, *one) for one in zip(samples, advantages, strict=True)]
        if data:
            training.forward_backward(data, "importance_sampling")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-3))
        rewards_of_steps.append(fmean(rewards_of_step))
        training.log_metrics({"reward": rewards_of_steps[-1]}, step)
        show(f"step {step:3}  reward {rewards_of_steps[-1]:.2f}")

    before, after = fmean(rewards_of_steps[:5]), fmean(rewards_of_steps[-5:])
    show(f"mean reward of five steps: {before:.2f} at first, {after:.2f} at last")
    print(json.dumps({"reward": [before, after]}))


def policy_datum(prompt: lorry.ModelInput, sample: lorry.SampledSequence, advantage: float) -> lorry.Datum:
    """Position i of the input predicts token i + 1; only what was sampled has an advantage."""
    tokens, quiet = prompt.to_ints() + sample.tokens, [0.0] * (prompt.length - 1)
    inputs = {
        "target_tokens": tokens[1:],
        "logprobs": quiet + sample.logprobs,
        "advantages": quiet + [advantage] * len(sample.tokens),
    }
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), inputs)


def main(
    address: Annotated[str | None, typer.Option(envvar="LORRY_ADDRESS", help="Of a service that runs")] = None,
    api_key: Annotated[str, typer.Option(envvar="LORRY_API_KEY")] = "",
    model: Annotated[str, typer.Option(help="As the service calls it")] = "jargon-1m",
    warm_steps: int = 60,
    steps: int = 40,
    questions: Annotated[int, typer.Option(help="Asked in each step")] = 32,
    group: Annotated[int, typer.Option(help="Answers to each question")] = 16,
) -> None:
    async def run() -> None:
        async with lorry.connect(address, api_key=api_key) if address else lorry.local() as service:
            await train(service, model, warm_steps, steps, questions, group)

    anyio.run(run)


if __name__ == "__main__":
    typer.run(main)
