"""A run's numbers over HTTP and as files: logged, read in every form, and brought in from what loops write."""

import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.types import ForwardBackwardOutput
from typer.testing import CliRunner

from lorry.cli import app
from lorry.client.metric_files import FORMATS, MetricLines, writer_of
from lorry.wire.metrics import SourcedPoint
from lorry.wire.reducing import reduced

from .conftest import Tenant
from .test_requests import a_run

POINTS = [
    SourcedPoint("loop", 0, 1.5, {"reward": 0.5, "step": 9.0}),
    SourcedPoint("training", 0, 2.0, {"loss:sum": math.nan}),
    SourcedPoint("loop", 7, 3.0, {"reward": -math.inf, 'a,"b': 1.0}),
]
NAMES = ['a,"b', "loss:sum", "reward", "step"]

PARTS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 9)), min_size=1, max_size=5)


@given(PARTS, st.sampled_from(["sum", "mean", "min", "max"]))
def test_metrics_come_together_as_the_sdk_has_them_come_together(parts: list[tuple[float, int]], how: str) -> None:
    name = f"x:{how}"
    outputs = [
        ForwardBackwardOutput(loss_fn_output_type="t", loss_fn_outputs=[{}] * data, metrics={name: value})
        for value, data in parts
    ]
    theirs = combine_fwd_bwd_output_results(outputs).metrics[name]
    assert reduced([({name: value}, data) for value, data in parts])[name] == pytest.approx(theirs, abs=1e-6)


def file_of(form: str) -> bytes:
    writer = writer_of(form, NAMES)
    return writer.begin() + b"".join(writer.add(POINTS[i : i + 2]) for i in (0, 2, 4)) + writer.end()


def test_a_file_of_each_form_holds_all_that_there_is() -> None:
    parsed = json.loads(file_of("json"))["points"]
    assert parsed == [json.loads(line) for line in file_of("jsonl").splitlines()]
    assert parsed[1] == {"step": 0, "source": "training", "at": 2.0, "values": {"loss:sum": "NaN"}}
    rows = list(csv.DictReader(io.StringIO(file_of("csv").decode())))
    assert [row["step"] for row in rows] == ["0", "0", "7"] and [row["reward"] for row in rows] == [
        "0.5",
        "",
        "-Infinity",
    ]
    assert rows[0]["step (logged)"] == "9.0" and rows[2]['a,"b'] == "1.0"
    import pyarrow.parquet as parquet

    table = parquet.read_table(io.BytesIO(file_of("parquet"))).to_pydict()
    assert (table["step"], table["source"]) == ([0, 0, 7], ["loop", "training", "loop"])
    assert table["reward"] == [0.5, None, -math.inf] and math.isnan(table["loss:sum"][1])
    for form in FORMATS:
        writer = writer_of(form, [])
        assert writer.begin() + writer.add([]) + writer.end() or form == "jsonl", "a run without numbers"
    assert json.loads(writer_of("json", []).begin() + writer_of("json", []).end()) == {"points": []}


def test_lines_of_a_loop_are_read_and_what_is_no_number_is_told() -> None:
    """As tinker-cookbook's ml_log writes them, and as they are exported."""
    lines = [
        '{"step": 0, "env/all/reward": 0.5, "progress/batch": 0, "time/total": 1.25, "note": "x", "done": true}',
        '{"step": 1, "loss": NaN, "big": 1' + "0" * 400 + "}",
        '{"loss": 1.0}',
        '{"step": "2", "loss": 1.0}',
        "[1]",
        "[" * 100_000,
        '{"step": 3, "half a pair \\ud800": 1.0}',
        '{"step": 2, "lo',
        "",
        file_of("jsonl").decode().splitlines()[2],
    ]
    reader = MetricLines()
    points = list(reader.points(lines))
    assert [point.step for point in points] == [0, 1, 3, 7]
    assert points[0].values == {"env/all/reward": 0.5, "progress/batch": 0.0, "time/total": 1.25}
    assert math.isnan(points[1].values["loss"]) and (points[3].at, points[3].values["reward"]) == (3.0, -math.inf)
    assert reader.told() == [
        "3 lines that are no JSON object",
        "2 lines without a step",
        "1 values of 'big' that are no numbers",
        "1 values of 'done' that are no numbers",
        "1 values of 'half a pair \\\\ud800' that are no numbers",
        "1 values of 'note' that are no numbers",
    ]


@pytest.fixture
def http(tenant: Tenant) -> Iterator[httpx.Client]:
    with tenant.http() as http:
        yield http


def test_numbers_are_logged_and_read_over_http_page_by_page(http: httpx.Client) -> None:
    run = a_run(http)
    points: list[dict[str, Any]] = [{"step": step, "values": {"x": step % 7}} for step in range(2345)]
    points[3]["values"] = {"x": "NaN", "y": "Infinity", "z": 1.0}
    assert http.post(f"training_runs/{run}/metrics", json={"points": points}).status_code == 204
    where = f"training_runs/{run}/metrics"
    read = http.get(where).json()["points"]
    assert [point["step"] for point in read] == list(range(2345))
    assert read[3]["values"] == points[3]["values"] and {point["source"] for point in read} == {"loop"}
    for form, lines in (("csv", 2346), ("jsonl", 2345)):
        answer = http.get(where, params={"format": form})
        assert len(answer.text.splitlines()) == lines and form in answer.headers["content-type"]
    few = http.get(where, params={"at_most_points": 40, "name": "x"}).json()["points"]
    assert len(few) <= 41 and few[-1]["step"] == 2344 and any(point["values"]["x"] == "NaN" for point in few)
    parquet = http.get(where, params={"format": "parquet", "name": ["x", "z"]})
    assert parquet.content[:4] == parquet.content[-4:] == b"PAR1"


@pytest.mark.parametrize(
    ("method", "asked", "status", "says"),
    [
        ("GET", {"params": {"format": "xls"}}, 400, "format is 'xls', expected one of json, csv, jsonl, parquet"),
        ("GET", {"params": {"at_most_points": 3}}, 400, "at_most_points"),
        ("POST", {"json": {"points": [{"step": -1, "values": {}}]}}, 422, "points.0.step"),
        ("POST", {"json": {"points": [{"step": 0, "values": {"x": "much"}}]}}, 422, "points.0.values.x"),
        ("POST", {"json": {"points": [{"step": 0, "values": {"": 1}}]}}, 400, "points[0].values is ''"),
        ("POST", {"json": {"points": [{"step": 0, "values": {"x": 1}, "at": 1e300}]}}, 400, "points[0].at is 1e+300"),
        ("POST", {"json": {"points": [{"step": 0, "values": {str(i): 1 for i in range(257)}}]}}, 403, "256 in all"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(
    http: httpx.Client, method: str, asked: dict[str, Any], status: int, says: str
) -> None:
    answer = http.request(method, f"training_runs/{a_run(http)}/metrics", **asked)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text


def test_without_pyarrow_it_is_said_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"format is 'parquet', expected json.*pip install lorry\[parquet\]"):
        writer_of("parquet", [])


def test_a_file_that_a_loop_wrote_is_imported_and_taken_away_again(
    tenant: Tenant, http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_API_KEY", tenant.key)
    run, file, at = a_run(http), tmp_path / "metrics.jsonl", ["--data", str(tenant.server.data)]
    file.write_text('{"step": 0, "reward": 0.5, "note": "x"}\n{"step": 1, "reward": 1.0}\n')
    imported = CliRunner().invoke(app, ["metrics", "import", run, str(file), *at])
    assert imported.exit_code == 0, imported.output
    assert f"Logged 2 numbers of 2 steps of {run}." in imported.output
    assert "Left out 1 values of 'note' that are no numbers." in imported.output
    asked = ["metrics", "export", run, "--format", "csv", *at]
    by_key = CliRunner().invoke(app, asked).stdout
    assert [row["reward"] for row in csv.DictReader(io.StringIO(by_key))] == ["0.5", "1.0"]
    monkeypatch.delenv("LORRY_API_KEY")
    assert CliRunner().invoke(app, asked).stdout == by_key, "whoever reads the folder needs no key"
    written = CliRunner().invoke(app, [*asked, "--output", str(tmp_path / "x.csv")])
    assert written.exit_code == 0 and (tmp_path / "x.csv").read_text() == by_key
    assert CliRunner().invoke(app, [*asked, "--output", str(tmp_path / "x.csv")]).exit_code != 0, "it exists"
    refused = CliRunner().invoke(app, ["metrics", "import", run, str(file), *at])
    assert refused.exit_code != 0 and "LORRY_API_KEY" in refused.output
    refused = CliRunner().invoke(app, ["metrics", "import", run, str(tmp_path), *at])
    assert refused.exit_code == 2, "a folder is none"
