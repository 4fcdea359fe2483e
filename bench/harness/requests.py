"""What is in each request of a workload: the same for the same seed, whoever serves it and however fast. Pure."""

from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from .workload import Range, Recorded, Sample, Tenant, Train, Workload


@dataclass(frozen=True, slots=True)
class Row:
    """Each token predicts the next. `logprobs` and `advantages` are there for losses that want them."""

    tokens: list[int]
    targets: list[int]
    logprobs: list[float] | None = None
    advantages: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    rows: list[Row]
    loss_fn: str
    step: bool

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    max_tokens: int
    samples: int
    seed: int
    base: bool


Request: TypeAlias = Batch | Prompt


class Requests:
    """Of one tenant, by name; each by its number."""

    def __init__(self, workload: Workload, tenant: Tenant, name: str) -> None:
        self._vocab, self._tenant = workload.vocab, tenant
        self._seed = f"{workload.seed}/{name}"
        longest = max((work.shared_prefix for work in tenant.work if isinstance(work, Sample)), default=0)
        self._prefix = _tokens(Random(f"{self._seed}/prefix"), longest, self._vocab)

    def request(self, number: int) -> Request:
        random, every = Random(f"{self._seed}/{number}"), self._tenant.work
        if isinstance(self._tenant.arrival, Recorded):
            work = every[number]
        else:
            (work,) = random.choices(every, [work.weight for work in every])
        return self._batch(work, random) if isinstance(work, Train) else self._prompt(work, random)

    def _batch(self, work: Train, random: Random) -> Batch:
        rows = [self._row(work, random) for _ in range(_drawn(work.rows, random))]
        return Batch(rows, work.loss_fn, work.step)

    def _row(self, work: Train, random: Random) -> Row:
        length = _drawn(work.tokens, random)
        tokens = _tokens(random, length + 1, self._vocab)
        if work.loss_fn == "cross_entropy":
            return Row(tokens[:-1], tokens[1:])
        logprobs = [-random.expovariate(1.0) for _ in range(length)]
        return Row(tokens[:-1], tokens[1:], logprobs, [random.gauss() for _ in range(length)])

    def _prompt(self, work: Sample, random: Random) -> Prompt:
        length = _drawn(work.prompt_tokens, random)
        own = _tokens(random, length - work.shared_prefix, self._vocab)
        prompt = self._prefix[: work.shared_prefix] + own
        return Prompt(prompt, _drawn(work.max_tokens, random), work.samples, random.getrandbits(31), work.base)


def _tokens(random: Random, count: int, vocab: int) -> list[int]:
    return [random.randrange(vocab) for _ in range(count)]


def _drawn(value: Range, random: Random) -> int:
    return value if isinstance(value, int) else random.randint(*value)
