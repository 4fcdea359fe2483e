"""`lorry bench` as a user has it: against a server that it starts, one that runs, and one of the Tinker API."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from lorry.bench.records import read_records
from lorry.bench.sweep import Point
from lorry.bench.totals import Totals, read_totals
from lorry.bench.workload import Sample, Train, parse_workload
from lorry.benching import app
from tests.conftest import BASE_MODEL, LORRY, MODEL, Server, start_server

WORKLOAD = f"""
name = "short"
model = "{MODEL}"
warm_up_s = 0.5
duration_s = 2
[[tenants]]
name = "trains"
rank = 4
work = [{{ kind = "train", rows = 2, tokens = [4, 8] }}]
[[tenants]]
name = "samples"
rank = 4
count = 2
arrival = {{ kind = "poisson", rate_per_s = 3 }}
work = [
    {{ kind = "sample", prompt_tokens = 6, max_tokens = 4, samples = 2 }},
    {{ kind = "sample", prompt_tokens = 6, max_tokens = 4, base = true }},
]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server"), "--http", "127.0.0.1:0")
    yield server
    assert server.stop() in (0, 130)


def bench(*arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"} | ({"LORRY_API_KEY": key} if key else {})
    return subprocess.run([*LORRY, "bench", *arguments], capture_output=True, text=True, env=environment)


def measured(tmp_path: Path, *arguments: str, key: str | None = None, out: str = "out") -> Totals:
    workload = tmp_path / "short.toml"
    workload.write_text(WORKLOAD)
    found = bench("run", str(workload), *arguments, "--out", str(tmp_path / out), key=key)
    assert found.returncode == 0, found.stderr
    assert "trains" in found.stdout and "samples-1" in found.stdout
    totals = read_totals(tmp_path / out / "totals.json")
    for number, run in enumerate(totals.runs, 1):
        records = list(read_records(tmp_path / out / f"requests-{number}.jsonl"))
        assert {record.error for record in records} == {None}
        assert {record.tenant for record in records} == {"trains", "samples-0", "samples-1"}
        assert {record.tokens for record in records if record.kind == "sample"} == {4, 8}
        assert run.by_kind["train"].requests > 0 and run.by_kind["train"].errors == {}
    assert (tmp_path / out / "page.html").stat().st_size > 10_000
    return totals


def test_a_server_of_its_own_is_measured_twice_and_compared(tmp_path: Path) -> None:
    totals = measured(tmp_path, "--model", f"{MODEL}={BASE_MODEL}", "--threads", "1", "--repeats", "2")
    assert len(totals.runs) == 2
    assert totals.estimates["train latency p50 s"].low is not None
    again = shutil.copytree(tmp_path / "out", tmp_path / "again")
    compared = bench("compare", str(tmp_path / "out"), str(again / "totals.json"))
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("same") == len(totals.estimates)


def test_a_server_that_runs_is_measured_by_either_client(tmp_path: Path, server: Server) -> None:
    everybodys = server.new_key("everybody")
    measured(tmp_path, "--server", server.address, key=everybodys)
    loads = ("--load", "2", "--load", "0.5", "--server", server.address, "--out", str(tmp_path / "loads"))
    swept = bench("sweep", str(tmp_path / "short.toml"), *loads, key=everybodys)
    assert swept.returncode == 0 and "Every load was borne" in swept.stdout, swept.stderr + swept.stdout
    points = msgspec.json.decode((tmp_path / "loads" / "sweep.json").read_bytes(), type=list[Point])
    assert [point.scale for point in points] == [0.5, 2.0]
    assert all(list(read_records(tmp_path / "loads" / f"requests-{scale}.jsonl")) for scale in ("0.5", "2"))
    keys = tmp_path / "keys.toml"
    names = ("trains", "samples-0", "samples-1")
    keys.write_text("".join(f'{name} = "{server.new_key(name)}"\n' for name in names))
    assert server.url.startswith("http://")
    measured(tmp_path, "--server", server.url, "--keys", str(keys), out="by the SDK")


def test_what_a_service_did_is_recorded_while_it_runs_and_played_again(tmp_path: Path, server: Server) -> None:
    key = server.new_key("somebody")
    measured(tmp_path, "--server", server.address, key=key)
    done = list(read_records(tmp_path / "out" / "requests-1.jsonl"))
    again = tmp_path / "again.json"
    found = bench("record", MODEL, str(again), "--data", str(server.data))
    assert found.returncode == 0, found.stderr
    workload = parse_workload(again.read_text(), is_json=True)
    last = workload.tenants[-3:]  # those of this test, whose samplers are two for each who has two kinds of work
    assert sum(isinstance(work, Train) for tenant in workload.tenants for work in tenant.work) >= len(done) / 4
    assert all(work.max_tokens == 4 for tenant in last for work in tenant.work if isinstance(work, Sample))
    short = msgspec.structs.replace(workload, tenants=last, duration_s=workload.duration_s + 1)
    again.write_bytes(msgspec.json.encode(short))
    played = bench("run", str(again), "--server", server.address, "--out", str(tmp_path / "played"), key=key)
    assert played.returncode == 0, played.stderr
    records = list(read_records(tmp_path / "played" / "requests-1.jsonl"))
    assert len(records) == sum(len(tenant.work) for tenant in last)
    assert {record.error for record in records} == {None}
    assert bench("record", MODEL, str(again), "--data", str(server.data)).returncode == 78, "it is there already"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nowhere.toml"), "workload"),
        (("run", "{workload}"), "model is None, expected NAME=PATH_OR_HUB_ID"),
        (("run", "{workload}", "--server", "ftp://here"), "server is 'ftp://here'"),
        (("run", "{workload}", "--server", "tcp://127.0.0.1:1"), "no key is given for the tenant 'trains'"),
        (("run", "{workload}", "--server", "tcp://127.0.0.1:1", "--model", "x"), "none with --server"),
        (("run", "{workload}", "--server", "tcp://127.0.0.1:1", "--out", "{here}"), "a folder that is not there yet"),
        (("compare", "{workload}", "{workload}"), "short.toml: JSON is malformed"),
        (("compare", "nowhere", "nowhere"), "nowhere: [Errno 2]"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    workload = tmp_path / "short.toml"
    workload.write_text(WORKLOAD)
    found = CliRunner().invoke(app, [argument.format(workload=workload, here=tmp_path) for argument in arguments])
    assert found.exit_code == 78 and said in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("bench-results/*"))
