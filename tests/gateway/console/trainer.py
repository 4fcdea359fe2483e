"""A tenant's program that trains until its standard input ends: `python -m tests.gateway.console.trainer ADDRESS KEY
NAME`. It prints its run's id, and then the number of each step that is over."""

import asyncio
import sys

import anyio

import lorry

TOKENS = list(range(20, 40))


async def train(address: str, key: str, name: str) -> None:
    async with lorry.connect(address, api_key=key) as service:
        metadata = {"name": name, "secret": f"what only {name} knows"}
        training = await service.create_lora_training_client_async("jargon-1m", rank=4, seed=1, user_metadata=metadata)
        datum = lorry.Datum(lorry.ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TOKENS[1:]})
        print(training.model_id, flush=True)
        is_over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        step = 0
        while not is_over.done():
            backward = training.forward_backward([datum], "cross_entropy")
            await training.optim_step(lorry.AdamParams(learning_rate=1e-3))
            await training.log_metrics({"reward": (await backward).metrics["loss:sum"] / -100}, step=step)
            if step == 0:
                await training.save_state("early")
                await training.save_weights_for_sampler("early")
            print(step, flush=True)
            step += 1
            await anyio.sleep(0.05)


anyio.run(train, *sys.argv[1:])
