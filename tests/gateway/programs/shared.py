"""What the programs share: a run, an example, a few steps."""

from typing import Any

import tinker
from tinker import types

MODEL = "jargon-1m"
SENTENCE = "The carrier signs the bill of lading when the cargo is on board."


def ready(client: Any) -> Any:
    """Since 0.36 the SDK answers with a future of the client, before with the client."""
    return client.result() if hasattr(client, "result") else client


def tokens_of(training: Any, text: str = SENTENCE) -> list[int]:
    return training.get_tokenizer().encode(text)


def example(tokens: list[int]) -> types.Datum:
    weights = types.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32")
    targets = types.TensorData(data=tokens[1:], dtype="int64")
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )


def new_run(service: tinker.ServiceClient, rank: int = 4, **more: Any) -> Any:
    return ready(service.create_lora_training_client(base_model=MODEL, rank=rank, seed=7, **more))


def steps(training: Any, data: list[types.Datum], count: int) -> list[float]:
    losses: list[float] = []
    for _ in range(count):
        passed = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=5e-3))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses
