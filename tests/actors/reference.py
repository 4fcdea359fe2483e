"""The same training written plainly: PEFT, autograd, torch.optim.AdamW, one run and one datum at a time."""

from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from lorry.actors.model.adapter import Adapter
from lorry.wire.commands import ForwardBackwardInput
from lorry.wire.types import AdamParams, Datum


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
    """One run on its own copy of the base model, starting from an adapter's weights."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        config = LoraConfig(
            r=adapter.spec.rank,
            lora_alpha=cast(int, adapter.spec.alpha),
            target_modules=[target.name for target in adapter.targets],
        )
        self.model = cast(PeftModel, get_peft_model(model, config))
        self.rank = adapter.spec.rank
        with torch.no_grad():
            for name, (a, b) in adapter.module_weights().items():
                self._lora(name, "A").copy_(a)
                self._lora(name, "B").copy_(b.T)
        self.names = [target.name for target in adapter.targets]
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters)

    def _lora(self, name: str, letter: str) -> Tensor:
        return self.model.get_parameter(f"base_model.model.{name}.lora_{letter}.default.weight")

    def logprobs(self, datum: Datum) -> Tensor:
        """In the shape of the targets, [N] or [N, K]."""
        logits = self.model(torch.tensor([datum.model_input.to_ints()]), use_cache=False).logits[0]
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
        if params.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], params.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Tensor:
        """In the order of Lorry's flat vector."""
        return torch.cat([t.flatten() for n in self.names for t in (self._lora(n, "A"), self._lora(n, "B").T)]).detach()

    def grad(self) -> Tensor:
        pairs = [(self._lora(name, "A").grad, self._lora(name, "B").grad) for name in self.names]
        return torch.cat([t.flatten() for a, b in pairs if a is not None and b is not None for t in (a, b.T)])
