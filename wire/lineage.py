"""Which weights a run began from, as the journal has it."""

from typing import Literal, TypeAlias

import msgspec

from .ids import RunId

Way: TypeAlias = Literal["load", "copy", "import"]
"""A `load_state`; a checkpoint that was copied into a new run; an adapter that was brought in from elsewhere."""


class Descent(msgspec.Struct, frozen=True):
    """Into `run`, at `at` in Unix seconds, came what `path` names, or named then, as its user wrote it: None for what
    was trained elsewhere. It is the run's `parent` where no optimizer step of the run was before, and nothing else had
    come before. `with_optimizer` says whether moments and step count came, too."""

    run: RunId
    path: str | None
    at: float
    with_optimizer: bool
    way: Way
    parent: bool
