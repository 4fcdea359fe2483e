"""Prices are read as they are written, and costs add up to the last digit."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.config import read_prices
from lorry.scheduler.planning.prices import ModelPrices, Prices, cost, parse_prices
from lorry.wire.errors import InvalidRequestError

micro_dollars = st.integers(0, 10**10)
counts = st.integers(0, 10**12)


@given(st.lists(counts), micro_dollars)
def test_a_bill_is_the_same_however_its_tokens_were_split(parts: list[int], price: int) -> None:
    assert sum(cost(tokens, price) for tokens in parts) == cost(sum(parts), price)


@given(counts, micro_dollars)
def test_a_cost_is_tokens_times_dollars_per_million(tokens: int, price: int) -> None:
    dollars_per_million = Decimal(price) / 10**6
    assert Decimal(cost(tokens, price)) / 10**12 == tokens * dollars_per_million / 10**6


@given(micro_dollars)
def test_a_price_written_in_dollars_is_kept_to_the_micro_dollar(price: int) -> None:
    text = f"[m]\ntrain = {price // 10**6}.{price % 10**6:06d}\n"
    assert parse_prices(text).of("m", "train") == price


def test_a_model_that_is_not_named_has_the_others_price_and_without_any_all_is_free() -> None:
    prices = parse_prices('["a"]\nsample = 2\n["*"]\nsample = 1')
    assert [prices.of(model, "sample") for model in ("a", "b")] == [2_000_000, 1_000_000]
    assert prices.of("a", "train") == 0, "what a model's own table leaves out is free"
    assert Prices().of("a", "sample") == 0
    assert prices.by_model["a"] == ModelPrices(sample=2.0)


def test_a_cached_prompt_costs_a_fifth_of_a_computed_one_unless_it_has_a_price() -> None:
    prices = parse_prices('["a"]\nprefill = 2\n["b"]\nprefill = 2\ncached_prefill = 0')
    assert [prices.of(model, "cached_prefill") for model in ("a", "b")] == [400_000, 0]


def test_a_model_is_found_by_its_whole_name_or_by_what_a_hubs_id_ends_with() -> None:
    prices = parse_prices('["lab/a"]\ntrain = 1\n["a"]\ntrain = 2')
    assert [prices.of(model, "train") for model in ("lab/a", "other/a", "a", "b")] == [10**6, 2 * 10**6, 2 * 10**6, 0]
    assert prices.unknown(["lab/a", "x/a", "b"]) == ["b"]
    assert Prices().unknown(["a"]) == [], "where nothing has a price, nobody is surprised"


def test_the_list_that_ships_is_the_published_one() -> None:
    prices = read_prices("tinker")
    assert prices.of("Qwen/Qwen3-8B", "prefill") == 130_000
    assert prices.of("Qwen/Qwen3-8B", "cached_prefill") == 26_000
    assert prices.of("openai/gpt-oss-120b", "train") == 520_000
    assert prices.of("moonshotai/Kimi-K2-Thinking", "sample") == 2_440_000
    assert len(prices.by_model) == 15


@given(st.integers(1, 1024), st.integers(1, 1 << 19))
def test_what_a_command_can_cost_can_be_written_down(rows: int, tokens: int) -> None:
    dearest = parse_prices("[m]\nsample = 10000").of("m", "sample")
    assert cost(rows * tokens, dearest) < 2**63


@pytest.mark.parametrize(
    "text", ["sample = 1", "[a]\nsamples = 1", "[a]\nsample = -1", "[a]\nsample = nan", "[a", '[a]\nsample = "x"']
)
def test_what_is_no_table_of_prices_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="prices"):
        parse_prices(text)
