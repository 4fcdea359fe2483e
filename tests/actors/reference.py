"""The same training written plainly: PEFT, autograd, torch.optim.AdamW, one run and one datum at a time."""

from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from lorry.actors.model.adapter import Adapter
from lorry.actors.model.spec import Target, shapes_of
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.types import AdamParams, Datum

from .pictures import as_the_model_takes


def plain_loss(loss_fn: str, p: Tensor, inputs: dict[str, Tensor], config: dict[str, float]) -> Tensor:
    """Per token, from the formulas of the documentation, differentiable in p."""
    weights = inputs.get("weights", torch.ones_like(p)) * inputs.get("mask", torch.ones_like(p))
    if loss_fn == "cross_entropy":
        return -p * weights
    q, advantages = inputs["logprobs"], inputs["advantages"]
    ratio = (p - q).exp()
    clipped = ratio.clamp(config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2))
    if loss_fn == "gspo":
        value = (p - q).detach()[inputs["sequence_ratio_mask"] != 0].mean().exp()
        ratio = value * (p - p.detach()).exp()
        clipped = ratio.clamp(config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2))
        return -torch.minimum(ratio * advantages, clipped * advantages) * weights
    losses = {
        "importance_sampling": -ratio * advantages,
        "ppo": -torch.minimum(ratio * advantages, clipped * advantages),
        "cispo": -clipped.detach() * p * advantages,
        "dro": -(p * advantages - config.get("beta", 0.05) / 2 * (p - q) ** 2),
    }
    return losses[loss_fn] * weights


class PeftRun:
    """One run on its own copy of the base model, starting from an adapter's weights.

    PEFT has a factor for each expert. Where the adapter has one for them all, every expert's copy gets the sum of the
    copies' gradients, so that they stay one.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        # Beside experts, PEFT takes the name of a dense MLP's layer for that of the experts' weights.
        mixture = any(target.experts for target in adapter.targets)
        parameters = [target for target in adapter.targets if mixture and target.group == "mlp"]
        config = LoraConfig(
            r=adapter.spec.rank,
            lora_alpha=cast(int, adapter.spec.alpha),
            target_modules=[target.name for target in adapter.targets if target not in parameters],
            target_parameters=[target.name if target.experts else f"{target.name}.weight" for target in parameters],
        )
        self.model = cast(PeftModel, get_peft_model(model, config))
        self.rank, self.targets, self.spec = adapter.spec.rank, adapter.targets, adapter.spec
        with torch.no_grad():
            for target in self.targets:
                for letter, factor in zip("AB", adapter.module_weights()[target.name], strict=True):
                    self._parameter(target, letter).copy_(as_peft(target, letter, factor))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])

    def _parameter(self, target: Target, letter: str) -> Tensor:
        name = target.name
        if target.experts is not None:
            name, _, leaf = name.rpartition(".")
            name += ".base_layer" if leaf == "gate_up_proj" else ""
        return self.model.get_parameter(f"base_model.model.{name}.lora_{letter}.default.weight")

    def logprobs(self, datum: Datum) -> Tensor:
        """In the shape of the targets, [N] or [N, K]."""
        logits = self.model(**as_the_model_takes(datum.model_input), use_cache=False).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        return logits.log_softmax(-1).gather(1, targets.reshape(len(targets), -1)).reshape(targets.shape)

    def forward_backward(self, request: ForwardBackwardInput) -> tuple[list[Tensor], float]:
        logprobs, total = [], 0.0
        for datum in request.data:
            p = self.logprobs(datum)
            inputs = {name: tensor.to_torch() for name, tensor in datum.loss_fn_inputs.items()}
            loss = plain_loss(request.loss_fn, p, inputs, request.loss_fn_config).sum()
            loss.backward()
            logprobs.append(p.detach())
            total += loss.item()
        return logprobs, total

    def step(self, params: AdamParams) -> None:
        for group in self.optimizer.param_groups:
            group.update(
                lr=params.learning_rate,
                betas=(params.beta1, params.beta2),
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        limit = params.grad_clip_norm
        factor = min(1.0, limit / (self.grad().norm().item() + 1e-6)) if limit > 0 else 1.0
        for target in self.targets:
            for letter in "AB":
                summed = self._factor(target, letter, grad=True) * factor
                self._parameter(target, letter).grad = as_peft(target, letter, summed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Tensor:
        """In the order of Lorry's flat vector."""
        return torch.cat([self._factor(t, letter, grad=False).flatten() for t in self.targets for letter in "AB"])

    def grad(self) -> Tensor:
        return torch.cat([self._factor(t, letter, grad=True).flatten() for t in self.targets for letter in "AB"])

    def _factor(self, target: Target, letter: str, *, grad: bool) -> Tensor:
        """As an adapter has it: A [rank, inputs], B [rank, outputs], with experts in front where there are some."""
        parameter = self._parameter(target, letter)
        tensor = parameter.detach()
        if grad:
            tensor = torch.zeros_like(tensor) if parameter.grad is None else parameter.grad
        if target.experts is None:
            return tensor if letter == "A" else tensor.T
        if letter == "A":
            factor = tensor.view(target.experts, self.rank, -1)
        else:
            factor = tensor.view(-1, self.rank, target.experts).permute(2, 1, 0)
        if shapes_of(self.spec, target)[letter == "B"][0] == 1:
            return factor.sum(0, keepdim=True) if grad else factor[:1]
        return factor


def as_peft(target: Target, letter: str, factor: Tensor) -> Tensor:
    """A or B transposed, as an adapter has them, in PEFT's shape: experts side by side."""
    if target.experts is None:
        return factor if letter == "A" else factor.T
    each = factor.expand(target.experts, -1, -1)
    return each.flatten(0, 1) if letter == "A" else each.permute(2, 1, 0).flatten(1)
