"""What a benchmark comes to: the figures of its runs, how sure they are, and where they were found."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from scipy import stats

from lorry.wire.errors import InvalidRequestError

from .figures import Figures, RunFigures
from .workload import Workload

PACKAGES = ("lorry", "tinker", "torch", "transformers", "peft", "pyzmq")


class Facts(msgspec.Struct, frozen=True):
    """`server` is what was measured, in the words of the command that did; `commit` is that of the working directory,
    where that is a clone."""

    server: str
    machine: str
    cores: int
    python: str
    packages: dict[str, str]
    commit: str | None
    began_at: str


class Estimate(msgspec.Struct, frozen=True):
    """Mean of the runs, and the bounds of its 95 % confidence interval by Student's t; none of a single run."""

    mean: float
    low: float | None
    high: float | None


class Totals(msgspec.Struct, frozen=True):
    facts: Facts
    workload: Workload
    runs: list[RunFigures]
    estimates: dict[str, Estimate]


def totals_of(facts: Facts, workload: Workload, runs: Sequence[RunFigures]) -> Totals:
    every = [measures_of(run) for run in runs]
    names = [name for name in every[0] if all(name in measures for measures in every)]
    estimates = {name: estimate([measures[name] for measures in every]) for name in names}
    return Totals(facts, workload, list(runs), estimates)


def measures_of(run: RunFigures) -> dict[str, float]:
    """The numbers that runs are compared by, by name."""
    found = {} if run.fairness is None else {"fairness": run.fairness}
    if run.device is not None:
        found |= {"device training": run.device.train, "device sampling": run.device.sample}
    for kind, figures in run.by_kind.items():
        found |= {f"{kind} {name}": value for name, value in _of_kind(figures).items()}
    return found


def _of_kind(figures: Figures) -> dict[str, float]:
    found = {
        "requests/s": figures.requests_per_s,
        "tokens/s": figures.tokens_per_s,
        "goodput/s": figures.goodput_per_s,
        "errors": float(sum(figures.errors.values())),
    }
    for what, spread in (
        ("latency", figures.latency_s),
        ("acknowledged", figures.acknowledged_s),
        ("first token", figures.first_token_s),
        ("between tokens", figures.between_tokens_s),
    ):
        if spread is not None:
            found |= {f"{what} p50 s": spread.p50, f"{what} p99 s": spread.p99}
    return found


def estimate(values: Sequence[float]) -> Estimate:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    error = float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, mean - reach, mean + reach)


def facts_of(server: str, began_at: str) -> Facts:
    return Facts(
        server=server,
        machine=f"{platform.system()} {platform.machine()}, {_processor()}",
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name)) is not None},
        commit=_commit(),
        began_at=began_at,
    )


def read_totals(path: Path) -> Totals:
    """Raises InvalidRequestError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Totals)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequestError(f"{path}: {error}", field="totals") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown processor")


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
