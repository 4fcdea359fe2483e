"""A disk that is full or damaged: who needs it waits or is told, nobody gets a wrong number, and nothing is lost."""

import itertools
import os
import resource
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest
from anyio import to_thread

import lorry
from lorry.storage.connection import FILE
from lorry.storage.store import Store
from tests.conftest import BASE_MODEL, LORRY, MODEL, Server, children_of, start_server
from tests.service.raw import Raw
from tests.service.test_recovery import learn
from tests.service.test_training import datum


@contextmanager
def full_disk(server: Server) -> Iterator[None]:
    """The system refuses what the broker writes to files meanwhile, wherever in the file it is."""
    broker = children_of(server.process.pid)["broker"]
    _, most = resource.prlimit(broker, resource.RLIMIT_FSIZE)
    resource.prlimit(broker, resource.RLIMIT_FSIZE, (0, most))
    try:
        yield
    finally:
        resource.prlimit(broker, resource.RLIMIT_FSIZE, (most, most))


def refused(raw: Raw) -> str:
    """Why what has to be written is refused. The first such request is what meets the disk, and waits with it."""
    for number in itertools.count(1):
        raw.send({"type": "create_sampler", "request": number, "nonce": str(number), "base_model": MODEL})
        if raw.hears(within_ms=100):
            return raw.receive_header()["error"]["message"]
    raise AssertionError


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests may harm. What is held goes out again with a heartbeat."""
    server = start_server(tmp_path_factory.mktemp("own"), "--http", "127.0.0.1:0", "--heartbeat-s", "2")
    yield server
    server.stop()


async def test_a_full_disk_is_a_pause(own_server: Server) -> None:
    async with lorry.connect(own_server.address, api_key=own_server.new_key("alice")) as service:
        undisturbed = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        expected = await learn(undisturbed, 4)
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        found = await learn(training, 1)
        with full_disk(own_server), Raw.connected(own_server.address) as raw:
            raw.hello(own_server.new_key("bob"))
            future = training.forward_backward([datum()], "cross_entropy")
            assert "cannot write its journal" in await to_thread.run_sync(refused, raw)
            training.optim_step(lorry.AdamParams(learning_rate=1e-3))
            assert len((await service.get_server_capabilities_async()).supported_models) == 1
        found.append((await future).metrics["loss:sum"])
        assert found + await learn(training, 2) == expected
    with closing(sqlite3.connect(own_server.data / FILE)) as database:
        assert database.execute("SELECT count(DISTINCT future), count(*) FROM usage").fetchone() == (8, 8)


async def test_over_http_a_full_disk_is_said_and_asked_again(own_server: Server) -> None:
    headers = {"X-API-Key": own_server.new_key("carol")}
    async with httpx.AsyncClient(base_url=own_server.url, headers=headers) as http:
        body = {"tags": [], "user_metadata": None, "sdk_version": "0", "type": "create_session"}
        with full_disk(own_server), Raw.connected(own_server.address) as raw:
            raw.hello(own_server.new_key("dave"))
            await to_thread.run_sync(refused, raw)
            answer = await http.post("/api/v1/create_session", json=body)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert "cannot write its journal" in answer.json()["detail"]
        while (answer := await http.post("/api/v1/create_session", json=body)).status_code == 503:
            pass
        assert answer.status_code == 200


def waited_for(log: list[str]) -> list[str]:
    return [line for line in log if "the disk is waited for" in line]


def read_until(stream: IO[str], word: str) -> list[str]:
    """What is said up to the line with the word; all that is said where there is none."""
    lines: list[str] = []
    while (line := stream.readline()) and word not in line:
        lines.append(line)
    return [*lines, line]


def test_a_broker_waits_for_a_disk_that_is_full_when_it_starts(tmp_path: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    command = [*LORRY, "broker", "--model", MODEL, "--bind", "tcp://127.0.0.1:*", "--data", str(tmp_path / "data")]
    limited = ["prlimit", f"--fsize=0:{'unlimited' if most == resource.RLIM_INFINITY else most}", *command]
    environment = os.environ | {"LORRY_ACTOR_TOKEN": "t", "COLUMNS": "200"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(limited, env=environment, text=True, **pipes) as broker:
        assert broker.stdout is not None and broker.stderr is not None
        log = read_until(broker.stderr, "the disk is waited for")
        resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (most, most))
        log += read_until(broker.stderr, "the start goes on")
        assert "clients" in broker.stdout.readline(), log
        broker.terminate()
        log += broker.stderr.readlines()
    assert len(waited_for(log)) == 1


def test_a_service_waits_for_a_disk_that_refuses_its_database_when_it_starts(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()  # as on a disk without room for another file, it cannot be opened
    command = [*LORRY, "serve", "--model", f"{MODEL}={BASE_MODEL}", "--bind", "tcp://127.0.0.1:*", "--no-http"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--data", str(tmp_path)], text=True, **pipes) as service:
        assert service.stdout is not None and service.stderr is not None
        log = read_until(service.stderr, "the disk is waited for")
        (tmp_path / FILE).rmdir()
        log += read_until(service.stderr, "actor ready")
        assert "Serving" in service.stdout.readline(), log
        service.terminate()
        log += service.stderr.readlines()
    assert len(waited_for(log)) == 1 and str(tmp_path / FILE) in waited_for(log)[0]
    assert not [line for line in log if "process ended" in line]


def test_a_service_ends_with_the_reason_where_its_database_is_damaged(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"x" * 8192)
    command = [*LORRY, "serve", "--model", f"{MODEL}={BASE_MODEL}", "--bind", "tcp://127.0.0.1:*", "--no-http"]
    ended = subprocess.run([*command, "--data", str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"{tmp_path / FILE} cannot be used: " in ended.stderr
    assert not waited_for(ended.stderr.splitlines())


@pytest.mark.parametrize("harm", ["it is cut", "it is no database"])
def test_a_database_that_is_damaged_is_said(tmp_path: Path, harm: str) -> None:
    Store(tmp_path).close()
    file = tmp_path / FILE
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if harm == "it is cut" else b"x" * len(content))
    command = [*LORRY, "broker", "--model", MODEL, "--bind", "tcp://127.0.0.1:*", "--data", str(tmp_path)]
    environment = os.environ | {"LORRY_ACTOR_TOKEN": "t", "COLUMNS": "200"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"lorry: {file} cannot be used: ")
    assert "lorry doctor" in ended.stderr
