"""The curves of `bench.curves`, each of few points, and how they are shown."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench import bare
from bench.curves import __main__ as command
from bench.curves import sampling, service, training
from bench.curves.curve import Curve, Point, json_of, spread, table_of, write_page


def small() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("measure", [training.tenants, training.ranks, training.rows, sampling.sequences])
def test_a_curve_of_the_engine_has_its_points(
    measure: Callable[[Sequence[int]], Iterable[Point]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (training, sampling):
        monkeypatch.setattr(module, "build_model", small)
    monkeypatch.setattr(training, "REPETITIONS", 2)
    points = list(measure([2, 4]))
    assert [point.at for point in points] == [2, 4]
    for point in points:
        assert all(value > 0 for value in point.found.values() if isinstance(value, float)), point


def test_a_curve_of_the_service_has_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ROUNDS", 2)
    monkeypatch.setattr(service, "TURNS", 2)
    one, more = service.runs([1, 9])
    assert (one.at, more.at) == (1, 9) and set(one.found) == {"ms a round of 8", "over the same 8 runs"}


def test_a_bare_broker_answers_all(tmp_path: Path) -> None:
    found = bare.measure(tmp_path / "bare.db", 2000, 64)
    assert found.per_core_second > 0 and len(found.alone_ms) == 200


POINTS = [Point(1, {"ms": (1.5, 1.25, 2.0), "tokens/s": 1234.0}), Point(10, {"ms": (3.0, 2.0, 4.0), "tokens/s": 0.5})]
CURVE = Curve("a title", "things", [1, 10], lambda at: iter(POINTS))


def test_a_table_and_a_line_of_json_say_what_was_found() -> None:
    console = Console(width=100, record=True)
    console.print(table_of(CURVE, POINTS))
    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in console.export_text().splitlines() if "(" in line]
    assert rows == [["1", "1.5 (1.25 to 2)", "1,234"], ["10", "3 (2 to 4)", "0.5"]]
    found = json.loads(json_of("name", POINTS))
    assert found["points"][0] == {"at": 1, "ms": [1.5, 1.25, 2.0], "tokens/s": 1234.0}


def test_a_page_has_a_plot_for_each_column_and_fetches_nothing(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", CURVE, POINTS)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a title" in page and "tokens\\u002fs" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)


def test_the_quartiles_are_those_of_the_benchmarks() -> None:
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3.0)


def test_every_curve_that_is_named_rises() -> None:
    for curve in command.CURVES.values():
        assert list(curve.at) == sorted(set(curve.at))
