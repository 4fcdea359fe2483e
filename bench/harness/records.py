"""What became of each request, a line of JSON each."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """Times are seconds since the run began, of the client's clock. A request was `due_s`, was `sent_s` and
    `acknowledged_s` where the server says so; of a sample the tokens came at `token_s`, where they are told one by one;
    it ended at `done_s`, with an `error` and its `message` where it failed. `tokens` are those trained, or sampled."""

    tenant: str
    kind: Literal["train", "sample"]
    number: int
    due_s: float
    sent_s: float
    done_s: float
    tokens: int
    prompt_tokens: int = 0
    acknowledged_s: float | None = None
    token_s: list[float] = []
    error: str | None = None
    message: str = ""
    is_warm_up: bool = False

    @property
    def latency_s(self) -> float:
        """From when it was due: a client that comes late to send it hides nothing."""
        return self.done_s - self.due_s


def write_records(path: Path, records: Iterable[Record]) -> None:
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        file.writelines(encoder.encode(record) + b"\n" for record in records)


def read_records(path: Path) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(Record)
    with path.open("rb") as file:
        for line in file:
            yield decoder.decode(line)
