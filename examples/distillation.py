"""On-policy distillation: a student learns from its own samples, each token of which a teacher marks.

The teacher is an adapter that has learned to tell odd numbers from even ones. The student, a smaller adapter of the
same base model, has seen a few answers, and guesses. Then it answers by itself, and the advantage of each token is by
how much more probable the teacher finds it than the student did. Their mean, negated, is the reverse KL divergence of
the student from the teacher: it falls, and the student is right more often, though nobody tells it what is right.

    python examples/distillation.py                   # a service of its own, on this machine
    python examples/distillation.py --address ...     # one that runs; the key is in LORRY_API_KEY
"""

import json
import random
from statistics import fmean
from typing import Annotated

import anyio
import typer
from rich import print as show

import lorry


def question(number: int) -> str:
    return f"The number {number} is"


def answer(number: int) -> str:
    return " even." if number % 2 == 0 else " odd."


async def supervised(training: lorry.TrainingClient, steps: int) -> None:
    tokenizer = await training.get_tokenizer_async()
    draw = random.Random(1)
    for _ in range(steps):
        data = []
        for number in draw.sample(range(100, 1000), 32):
            asked, told = tokenizer.encode(question(number)), tokenizer.encode(answer(number))
            tokens, weights = asked + told, [0.0] * (len(asked) - 1) + [1.0] * len(told)
            inputs = {"target_tokens": tokens[1:], "weights": weights}
            data.append(lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), inputs))
        training.forward_backward(data, "cross_entropy")
        await training.optim_step(lorry.AdamParams(learning_rate=5e-3))


async def distil(
    student: lorry.TrainingClient, teacher: lorry.SamplingClient, steps: int, questions: int, group: int
) -> None:
    tokenizer = await student.get_tokenizer_async()
    draw = random.Random(2)
    divergence: list[float] = []
    accuracy: list[float] = []
    for step in range(steps):
        sampler = await student.save_weights_and_get_sampling_client_async()
        params = lorry.SamplingParams(max_tokens=3, temperature=1.0, seed=step)
        numbers = draw.sample(range(100, 1000), questions)
        prompts = [lorry.ModelInput.from_ints(tokenizer.encode(question(number))) for number in numbers]
        futures = [sampler.sample(prompt, group, params) for prompt in prompts]  # all under way at once
        samples = [(prompt, one) for prompt, f in zip(prompts, futures, strict=True) for one in (await f).sequences]
        marked = [teacher.compute_logprobs(whole(prompt, sample)) for prompt, sample in samples]
        gaps = []
        for (prompt, sample), future in zip(samples, marked, strict=True):
            of_teacher = (await future)[prompt.length :]
            gaps.append([(t or 0.0) - s for t, s in zip(of_teacher, sample.logprobs, strict=True)])
        data = [policy_datum(prompt, sample, row) for (prompt, sample), row in zip(samples, gaps, strict=True)]
        student.forward_backward(data, "importance_sampling")
        await student.optim_step(lorry.AdamParams(learning_rate=1e-3))

        told = [answer(number) for number in numbers for _ in range(group)]
        right = [tokenizer.decode(one.tokens).startswith(a) for (_, one), a in zip(samples, told, strict=True)]
        divergence.append(-fmean(gap for row in gaps for gap in row))
        accuracy.append(fmean(right))
        student.log_metrics({"reverse_kl": divergence[-1], "accuracy": accuracy[-1]}, step)
        show(f"step {step:3}  reverse KL {divergence[-1]:6.3f} per token, {accuracy[-1]:4.0%} right")

    shown = {"reverse_kl": divergence, "accuracy": accuracy}
    print(json.dumps({name: [fmean(values[:3]), fmean(values[-3:])] for name, values in shown.items()}))


def whole(prompt: lorry.ModelInput, sample: lorry.SampledSequence) -> lorry.ModelInput:
    return lorry.ModelInput.from_ints(prompt.to_ints() + sample.tokens)


def policy_datum(prompt: lorry.ModelInput, sample: lorry.SampledSequence, advantages: list[float]) -> lorry.Datum:
    """Position i of the input predicts token i + 1; only what was sampled has an advantage."""
    tokens, quiet = prompt.to_ints() + sample.tokens, [0.0] * (prompt.length - 1)
    inputs = {"target_tokens": tokens[1:], "logprobs": quiet + sample.logprobs, "advantages": quiet + advantages}
    return lorry.Datum(lorry.ModelInput.from_ints(tokens[:-1]), inputs)


def main(
    address: Annotated[str | None, typer.Option(envvar="LORRY_ADDRESS", help="Of a service that runs")] = None,
    api_key: Annotated[str, typer.Option(envvar="LORRY_API_KEY")] = "",
    model: Annotated[str, typer.Option(help="As the service calls it")] = "jargon-1m",
    lessons: Annotated[int, typer.Option(help="Supervised steps of the teacher")] = 40,
    warm_steps: Annotated[int, typer.Option(help="Supervised steps of the student")] = 12,
    steps: Annotated[int, typer.Option(help="Of distillation")] = 40,
    questions: Annotated[int, typer.Option(help="Asked in each step")] = 32,
    group: Annotated[int, typer.Option(help="Answers to each question")] = 4,
) -> None:
    async def run() -> None:
        async with lorry.connect(address, api_key=api_key) if address else lorry.local() as service:
            teaching = await service.create_lora_training_client_async(model, rank=16, seed=1)
            student = await service.create_lora_training_client_async(model, rank=8, seed=2)
            async with anyio.create_task_group() as tasks:  # both at once: they share the base model's passes
                tasks.start_soon(supervised, teaching, lessons)
                tasks.start_soon(supervised, student, warm_steps)
            teacher = await teaching.save_weights_and_get_sampling_client_async("teacher")
            await distil(student, teacher, steps, questions, group)

    anyio.run(run)


if __name__ == "__main__":
    typer.run(main)
