"""What the SDK calls a request id: the future's id, led by what its result is to be read as. So no table is kept."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from ..wire.errors import NotFoundError
from ..wire.ids import FutureId, LaneId

ResultKind: TypeAlias = Literal[
    "create", "custom_loss", "pass", "step", "save", "load", "sampler", "external", "unload", "sample"
]


@dataclass(frozen=True, slots=True)
class RequestId:
    """`create` and `unload` are over once they are answered: what follows their kind is a run. So is `custom_loss`,
    which a loss follows."""

    kind: ResultKind
    future: FutureId

    def __str__(self) -> str:
        return f"{self.kind}@{self.future}"

    @classmethod
    def parse(cls, text: str) -> "RequestId":
        """Raises NotFoundError for anything that no gateway made."""
        kind, at, future = text.partition("@")
        if not at or kind not in get_args(ResultKind):
            raise NotFoundError(f"there is no request {text!r}", field="request_id")
        return cls(cast(ResultKind, kind), FutureId(future))

    @property
    def lane(self) -> LaneId:
        return LaneId(self.future.rpartition(":")[0])
