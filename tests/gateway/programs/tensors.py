"""Scripts that have tensors of torch's: the only ones for which the SDK is let find it."""

import dataclasses
from typing import Any

import tinker
import torch
from tinker import types

from .shared import example, new_run, tokens_of


def wide_targets() -> dict[str, Any]:
    """cross_entropy over [N, K] targets, dense and sparse, is the sum over the K."""
    training = new_run(tinker.ServiceClient())
    tokens = tokens_of(training)
    n = len(tokens) - 1
    ids = torch.tensor([[t, 5, 0, 0, 0, 0] for t in tokens[1:]])
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * n)
    prompt = types.ModelInput.from_ints(tokens[:-1])
    losses = {}
    for name, make in (("dense", types.TensorData.from_torch), ("sparse", types.TensorData.from_torch_sparse)):
        inputs = {"target_tokens": make(ids), "weights": make(weights)}
        datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
        losses[name] = training.forward([datum], "cross_entropy").result().metrics["loss:sum"]
    losses["narrow"] = training.forward([example(tokens)], "cross_entropy").result().metrics["loss:sum"]
    return losses


def custom_loss() -> dict[str, Any]:
    service = tinker.ServiceClient()

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -sum((p.sum() for p in logprobs), torch.tensor(0.0))
        return total, {"mine": 1.0}

    def traced(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = -logprobs.sum()
        return total, {"custom/mine:sum": total}

    handle = service.create_custom_loss(traced, {"logprobs": 1}).result()
    assert handle.loss_id is not None, "it runs on the server"
    norms: dict[str, float] = {}
    for name in ("custom", "traced", "built_in"):
        training = new_run(service)
        data = [example(tokens_of(training))]
        if name == "custom":
            passed = training.forward_backward_custom(data, loss).result()
        elif name == "traced":
            passed = training.forward_backward_custom(data, handle).result()
        else:
            passed = training.forward_backward(data, "cross_entropy").result()
        norms[name] = training.optim_step(types.AdamParams()).result().metrics["grad_norm"]
        norms[f"{name}_mine"] = passed.metrics.get("mine", 0.0)
        norms[f"{name}_sum"] = passed.metrics["loss:sum"]
        norms[f"{name}_traced_sum"] = passed.metrics.get("custom/mine:sum", 0.0)
    return norms


def custom_loss_mistakes() -> dict[str, Any]:
    """What each says, and that the run goes on."""
    service = tinker.ServiceClient()
    training = new_run(service)
    datum = example(tokens_of(training))

    def product(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.matmul(logprobs, logprobs), {}

    def misshapen(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (logprobs * weights[:2]).sum(), {}

    said: dict[str, str] = {}
    try:
        service.create_custom_loss(product, {"logprobs": 1}).result()
    except tinker.TinkerError as error:
        said["product"] = str(error)
    handle = service.create_custom_loss(misshapen, {"logprobs": 1, "weights": 1}).result()
    attempts = {"misshapen": handle, "forged": dataclasses.replace(handle, loss_id="loss-e30=")}
    for name, loss in attempts.items():
        try:
            training.forward_backward_custom([datum], loss).result()
        except tinker.TinkerError as error:
            said[name] = str(error)
    went_on = training.forward_backward([datum], "cross_entropy").result()
    return {"said": said, "outputs": len(went_on.loss_fn_outputs)}
