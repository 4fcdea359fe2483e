"""What a workload file may say, and what its requests are."""

import itertools
import math
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.bench.arrivals import arrivals
from lorry.bench.requests import Batch, Prompt, Requests
from lorry.bench.workload import Burst, Gamma, Poisson, Sample, Tenant, Train, Workload, parse_workload
from lorry.wire.errors import InvalidRequestError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "bench" / "workloads").glob("*.toml"))
TEXT = """
name = "w"
model = "m"
[[tenants]]
name = "a"
work = [{ kind = "train", rows = 2, tokens = [3, 5] }]
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_workloads_that_are_shipped_are_right(path: Path) -> None:
    assert parse_workload(path.read_text()).name == path.stem


def test_the_workload_of_the_documentation_is_right() -> None:
    page = (ROOT / "docs" / "benchmarking.md").read_text()
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert [tenant.name for tenant in parse_workload(shown).tenants] == ["researcher", "evaluation"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('name = "w"', "name = 3"), r"\$\.name"),
        (('model = "m"', ""), "model"),
        (("rows = 2", "rows = 0"), r"\$\.tenants\[0\]\.work\[0\]\.rows"),
        (("[3, 5]", "[5, 3]"), r"tenants\['a'\]\.work\.tokens is \[5, 3\]"),
        (("[3, 5]", "[5]"), r"tokens"),
        (("rows = 2", "rowz = 2"), "rowz"),
        (('kind = "train"', 'kind = "play"'), "play"),
        (('name = "a"', 'name = "../a"'), r"\$\.tenants\[0\]\.name"),
        (("[[tenants]]", "[[tenants]"), "workload"),
        (
            ("tokens = [3, 5] }", 'tokens = 4 }, { kind = "sample", prompt_tokens = 4, shared_prefix = 5 }'),
            "shared_prefix",
        ),
    ],
)
def test_a_mistake_is_refused_by_its_name(change: tuple[str, str], said: str) -> None:
    assert parse_workload(TEXT).tenants[0].work == [Train(rows=2, tokens=[3, 5])]
    with pytest.raises(InvalidRequestError, match=said):
        parse_workload(TEXT.replace(*change))


def test_two_tenants_of_one_name_are_refused() -> None:
    again = TEXT[TEXT.index("[[tenants]]") :]
    with pytest.raises(InvalidRequestError, match="that no other tenant has"):
        parse_workload(TEXT + again)


@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.0, 30.0]))
def test_arrivals_come_at_their_rate_and_in_order(seed: int, cv: float, ramp_up_s: float) -> None:
    rate, count = 4.0, 4000
    times = list(itertools.islice(arrivals(Gamma(rate, cv, ramp_up_s), Random(seed)), count))
    assert times == sorted(times)
    expected = count / rate + ramp_up_s / 2
    # The sum of n gaps has a standard deviation of cv sqrt(n) gaps: six of them are not seen in a thousand trials.
    assert abs(times[-1] - expected) < 6 * cv * math.sqrt(count) / rate


def test_a_gammas_gaps_vary_as_they_should() -> None:
    for cv in (0.25, 1.0, 3.0):
        times = list(itertools.islice(arrivals(Gamma(1.0, cv), Random(7)), 20_000))
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        found = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean
        assert found == pytest.approx(cv, rel=0.1)


def test_the_rate_grows_evenly_within_the_ramp_up() -> None:
    """A quarter of what comes within the ramp comes in its first half."""
    times = list(itertools.islice(arrivals(Poisson(100, ramp_up_s=100), Random(3)), 20_000))
    within = [time for time in times if time < 100]
    assert len(within) == pytest.approx(5000, rel=0.05)
    assert sum(time < 50 for time in within) / len(within) == pytest.approx(0.25, abs=0.03)


def test_bursts_come_together() -> None:
    assert list(itertools.islice(arrivals(Burst(2, 1.5), Random(0)), 5)) == [0, 0, 1.5, 1.5, 3]


def test_requests_are_the_same_for_the_same_seed_and_share_their_prefix() -> None:
    tenant = Tenant(
        "a",
        [
            Train(rows=[1, 4], tokens=[2, 9], loss_fn="ppo", weight=2),
            Sample(prompt_tokens=[8, 12], shared_prefix=5, max_tokens=[1, 6], samples=3),
        ],
    )
    workload = Workload("w", "m", [tenant], vocab=50, seed=3)
    first, second = Requests(workload, tenant, "a"), Requests(workload, tenant, "a")
    every = [first.request(number) for number in range(300)]
    assert every == [second.request(number) for number in reversed(range(300))][::-1]
    batches = [request for request in every if isinstance(request, Batch)]
    prompts = [request for request in every if isinstance(request, Prompt)]
    assert len(batches) == pytest.approx(200, abs=40)
    assert {len(batch.rows) for batch in batches} == {1, 2, 3, 4}
    for batch in batches:
        for row in batch.rows:
            assert 2 <= len(row.tokens) <= 9 and row.tokens[1:] == row.targets[:-1]
            assert row.logprobs is not None and max(row.logprobs) <= 0 and len(row.logprobs) == len(row.tokens)
    assert len({tuple(prompt.tokens[:5]) for prompt in prompts}) == 1
    assert len({tuple(prompt.tokens) for prompt in prompts}) == len(prompts)
    assert {len(prompt.tokens) for prompt in prompts} == set(range(8, 13))
    assert Requests(workload, tenant, "b").request(0) != every[0]
