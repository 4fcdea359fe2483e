"""A researcher's loop, in a process of its own: supervised or reinforcement, through Lorry's client or the SDK.

Prints a line of JSON for each step, which says all that it saw, and last how many tokens it sent and got. The two
clients have the same names, so there is one loop of each kind.
"""

import asyncio
import importlib
import json
import os
import sys
from typing import Annotated, Any, Literal

import typer

Api = Literal["lorry", "tinker"]
Kind = Literal["supervised", "reinforcement"]
_PATIENCE_S = 600.0
"""A loop that starts while all is being killed waits for its first answer longer than a user at a keyboard would."""


class Loop:
    """`api` is the module `lorry` or `tinker`."""

    def __init__(self, api: Any, service: Any, model: str, seed: int) -> None:
        self._api, self._service, self._model, self._seed = api, service, model, seed
        self._sent = {"train": 0, "prefill": 0, "sample": 0}

    async def run(self, kind: Kind, steps: int) -> None:
        training = await self._service.create_lora_training_client_async(
            base_model=self._model, rank=4, seed=self._seed
        )
        step = self._supervised if kind == "supervised" else self._reinforcement
        for number in range(steps):
            print(json.dumps({"step": number} | await step(training, number)), flush=True)
        print(json.dumps({"run": training.model_id, "sent": self._sent}), flush=True)

    async def _supervised(self, training: Any, number: int) -> dict[str, Any]:
        """Two datums, and a step that does not wait for their pass."""
        data = [self._datum(number), self._datum(number + 1)]
        backward = await training.forward_backward_async(data, "cross_entropy")
        stepped = await training.optim_step_async(self._api.AdamParams(learning_rate=1e-3))
        loss = (await backward).metrics["loss:sum"]
        await stepped
        return {"loss": loss}

    async def _reinforcement(self, training: Any, number: int) -> dict[str, Any]:
        """Samples of the newest weights, rewarded for even tokens, and trained on with their own logprobs."""
        sampling = await training.save_weights_and_get_sampling_client_async()
        prompt = self._tokens(number, 8)
        parameters = self._api.SamplingParams(max_tokens=6, temperature=1.0, seed=number, stop=[])
        response = await sampling.sample_async(
            prompt=self._api.ModelInput.from_ints(prompt), num_samples=2, sampling_params=parameters
        )
        self._sent["prefill"] += len(prompt)
        data: list[Any] = []
        for sequence in response.sequences:
            self._sent["sample"] += len(sequence.tokens)
            data.append(self._rewarded(prompt, list(sequence.tokens), list(sequence.logprobs)))
        backward = await training.forward_backward_async(data, "importance_sampling")
        stepped = await training.optim_step_async(self._api.AdamParams(learning_rate=1e-3))
        loss = (await backward).metrics["loss:sum"]
        await stepped
        return {"loss": loss, "tokens": [list(s.tokens) for s in response.sequences]}

    def _rewarded(self, prompt: list[int], tokens: list[int], logprobs: list[float]) -> Any:
        inputs, before = prompt + tokens[:-1], len(prompt) - 1
        self._sent["train"] += len(inputs)
        reward = sum(token % 2 == 0 for token in tokens) / len(tokens) - 0.5
        return self._api.Datum(
            model_input=self._api.ModelInput.from_ints(inputs),
            loss_fn_inputs={
                "target_tokens": self._tensor(prompt[1:] + tokens, "int64"),
                "logprobs": self._tensor([0.0] * before + logprobs, "float32"),
                "advantages": self._tensor([0.0] * before + [reward] * len(tokens), "float32"),
            },
        )

    def _datum(self, number: int) -> Any:
        tokens = self._tokens(number, 13)
        self._sent["train"] += 12
        inputs = {"target_tokens": self._tensor(tokens[1:], "int64"), "weights": self._tensor([1.0] * 12, "float32")}
        return self._api.Datum(model_input=self._api.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)

    def _tensor(self, values: list[Any], dtype: str) -> Any:
        return self._api.TensorData(data=values, dtype=dtype, shape=[len(values)])

    def _tokens(self, number: int, length: int) -> list[int]:
        return [7 + (31 * self._seed + 17 * number + 13 * i) % 1000 for i in range(length)]


def main(
    api: Api,
    kind: Kind,
    model: str,
    steps: Annotated[int, typer.Option()] = 10,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """LORRY_ADDRESS or TINKER_BASE_URL says where, and LORRY_API_KEY or TINKER_API_KEY as whom."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # the SDK does without, and would import it for two seconds
    module = importlib.import_module(api)

    async def run() -> None:
        if api == "lorry":
            address, key = os.environ["LORRY_ADDRESS"], os.environ["LORRY_API_KEY"]
            async with module.connect(address, api_key=key, timeout_s=_PATIENCE_S) as service:
                await Loop(module, service, model, seed).run(kind, steps)
        else:
            await Loop(module, module.ServiceClient(), model, seed).run(kind, steps)

    asyncio.run(run())
    os._exit(0)  # the SDK's background threads do not stop at the end


if __name__ == "__main__":
    typer.run(main)
