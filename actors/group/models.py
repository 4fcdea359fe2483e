"""A base model is divided among a group: from now on it is the first rank's part, and the others have theirs."""

import copy
from itertools import count

from ...wire.errors import UnsupportedModelError
from ..model.agreement import agree
from ..model.base_model import BaseModel
from ..model.loading import plain
from ..model.lora import LoraTargets, logits_of_some
from .adapters import Leader
from .dividing import COMPARED_TOKENS, check_divisible, take_share, tensors_of
from .leader import Group
from .messages import Build, Compare

_numbers = count(1)


def divide(group: Group, base: BaseModel, targets: LoraTargets) -> tuple[BaseModel, LoraTargets]:
    """`base` has its adapters' places already, and all of its weights, which it loses.

    Raises UnsupportedModelError where it cannot be divided among so many, with nothing changed, or where the ranks
    compute something else together than it did.
    """
    check_divisible(base, targets, group.ranks.size)
    expected = logits_of_some(base, COMPARED_TOKENS)
    leader = Leader(group, next(_numbers))
    tensors = [facts for facts, _ in tensors_of(base.model)]
    config = plain(copy.deepcopy(base.model.config))
    command = Build(
        config=config.to_json_string(use_diff=False),
        dtype=str(base.dtype).removeprefix("torch."),
        layout=targets.layout,
        tensors=tensors,
    )
    part, own = leader.run(command, lambda: take_share(base, targets, group.ranks, leader, tensors))
    part.in_flight.after_pause = lambda: group.go_on(part.in_flight.beside_others)
    found = leader.run(Compare(), lambda: logits_of_some(part, COMPARED_TOKENS))
    if not agree(found.cpu(), expected.cpu()):
        raise UnsupportedModelError(
            f"{type(base.model).__name__} computes something else on several devices: "
            "serve it without --tensor-parallel"
        )
    return part, own
