"""The processes as a whole: how large they are, and what happens when one of them dies."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import psutil
import pytest

import lorry
from lorry.serve import CONFIGURATION_EXIT
from lorry.wire.sockets import CurveKeys
from tests.actors.models import tiny_qwen3_moe
from tests.conftest import BASE_MODEL, MODEL, Server, children_of, standing_still, start_server
from tests.service.test_training import datum

MAX_RESIDENT_BYTES = 740e6
"""Of which some 470 are the actor's, which torch takes most of."""
VOCAB = 2048
"""Of the base model's tokenizer."""


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests may harm."""
    server = start_server(tmp_path_factory.mktemp("own"))
    yield server
    server.stop()


def family(server: Server) -> list[psutil.Process]:
    supervisor = psutil.Process(server.process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


@pytest.mark.parametrize(
    ("options", "count", "ending", "code"),
    [
        pytest.param((), 3, signal.SIGINT, 130, marks=pytest.mark.long),
        (("--http", "127.0.0.1:0"), 4, signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["Ctrl-C", "killed, with HTTP"],
)
def test_all_processes_are_small_and_none_outlives_the_supervisor(
    tmp_path: Path, options: tuple[str, ...], count: int, ending: int, code: int
) -> None:
    server = start_server(tmp_path, *options)
    processes = family(server)
    resident = {" ".join(p.cmdline()[2:6]): p.memory_info().rss for p in processes}
    with server.process:
        server.process.send_signal(ending)
        assert server.process.wait() == code
    if ending == signal.SIGKILL:  # its children find out by themselves
        psutil.wait_procs(processes)
    assert not [process for process in processes if process.is_running()]
    assert len(processes) == count
    assert sum(resident.values()) < MAX_RESIDENT_BYTES, resident


def wake_ups(process: int) -> int:
    """Voluntary context switches of the process's main thread: each time that it went to sleep again."""
    status = Path(f"/proc/{process}/task/{process}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


async def test_a_result_reaches_its_waiter_without_anything_polling(server: Server, new_key: Callable[[], str]) -> None:
    """While a command is queued and its waiter waits, nobody wakes up: the actor is stopped, so it cannot finish. The
    slower the machine, the fewer could."""
    broker = children_of(server.process.pid)["broker"]
    async with lorry.connect(server.address, api_key=new_key()) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4)
        await training.forward([datum()], "cross_entropy")
        with standing_still(server):
            future = await training.forward_async([datum()], "cross_entropy")
            await training.get_info_async()  # answered once the broker has handed out what was there before
            before = wake_ups(broker) + wake_ups(os.getpid())
            await anyio.sleep(5)
            woken = wake_ups(broker) + wake_ups(os.getpid()) - before
        assert (await future).metrics["loss:sum"] > 0
        assert woken <= 10


def test_broker_and_client_import_no_torch() -> None:
    modules = ("lorry", "lorry.client", "lorry.scheduler.broker", "lorry.serve", "lorry.cli")
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_work_goes_on_after_an_actor_is_killed_as_if_nothing_had_happened(own_server: Server) -> None:
    async def train(service: lorry.ServiceClient, kill_after: int | None) -> list[float]:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        futures = []
        for step in range(6):
            futures.append(training.forward_backward([datum()], "cross_entropy"))
            stepped = training.optim_step(lorry.AdamParams(learning_rate=1e-3))
            if step == 2:
                await training.save_state("halfway")
            if step == kill_after:
                await stepped
                os.kill(children_of(own_server.process.pid)["actor"], signal.SIGKILL)
        return [(await future).metrics["loss:sum"] for future in futures]

    async with lorry.connect(own_server.address, api_key=own_server.new_key("survivor")) as service:
        undisturbed = await train(service, kill_after=None)
        for moment in (1, 4):
            assert await train(service, kill_after=moment) == pytest.approx(undisturbed, rel=1e-4)
        usage = await service.create_rest_client().get_usage_async()
        assert [row.tokens for row in usage if row.kind == "train"] == [72, 72, 72], "replayed work is not billed again"


async def test_a_sample_in_flight_when_an_actor_is_killed_is_drawn_again(own_server: Server) -> None:
    async with lorry.connect(own_server.address, api_key=own_server.new_key("sampler")) as service:
        base = await service.create_sampling_client_async(base_model=MODEL)
        prompt = lorry.ModelInput.from_ints([1, 2, 3])
        long = base.sample(prompt, 2, lorry.SamplingParams(max_tokens=400, stop=[], seed=1))
        await base.sample(prompt, 1, lorry.SamplingParams(max_tokens=5, stop=[]))  # which began later, and has ended
        os.kill(children_of(own_server.process.pid)["actor"], signal.SIGKILL)
        assert [len(s.tokens) for s in (await long).sequences] == [400, 400]


async def test_a_killed_broker_costs_its_clients_a_pause(own_server: Server) -> None:
    async with lorry.connect(own_server.address, api_key=own_server.new_key("patient")) as service:
        training = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        reference = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
        step = lorry.AdamParams(learning_rate=1e-3)
        expected, got = [], []
        for _ in range(4):
            expected.append(reference.forward_backward([datum()], "cross_entropy"))
            await reference.optim_step(step)
        for i in range(4):
            got.append(training.forward_backward([datum()], "cross_entropy"))
            stepped = training.optim_step(step)
            if i == 1:
                await stepped
                os.kill(children_of(own_server.process.pid)["broker"], signal.SIGKILL)
        losses = [(await future).metrics["loss:sum"] for future in got]
        assert losses == pytest.approx([(await future).metrics["loss:sum"] for future in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "option", "words"),
    [
        ("empty", ("--slots", "2"), "cannot load a base model"),
        pytest.param(str(BASE_MODEL), ("--device", "warp:9"), "device is 'warp:9'", marks=pytest.mark.long),
        pytest.param(str(BASE_MODEL), ("--dtype", "float99"), "dtype is 'float99'", marks=pytest.mark.long),
        (str(BASE_MODEL), ("--prices", "nowhere.toml"), "prices is 'nowhere.toml'"),
    ],
)
def test_what_cannot_be_served_ends_serve_with_one_readable_line(
    tmp_path: Path, model: str, option: tuple[str, str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    command = [sys.executable, "-m", "lorry", "serve", "--model", str(tmp_path / model), "--data", str(tmp_path)]
    command += [*option, "--bind", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_service_on_the_same_folder_or_port_ends_with_one_readable_line(
    server: Server, tmp_path: Path
) -> None:
    def second(data: Path, bind: str) -> str:
        command = [sys.executable, "-m", "lorry", "broker", "--model", "x", "--data", str(data), "--bind", bind]
        environment = os.environ | {"LORRY_ACTOR_TOKEN": "token"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == CONFIGURATION_EXIT
        assert "Traceback" not in ended.stderr
        return ended.stderr

    assert "no other broker" in second(server.data, "tcp://127.0.0.1:*")
    assert "Address already in use" in second(tmp_path, server.address)
    assert "tcp://HOST:PORT" in second(tmp_path, "127.0.0.1")


def test_keys_are_created_with_the_service_running_and_printed_once(server: Server) -> None:
    command = [sys.executable, "-m", "lorry", "keys", "create", "--tenant", "cli", "--data", str(server.data)]
    key = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert key.startswith("tml-")
    assert key.encode() not in (server.data / "lorry.db").read_bytes()

    async def connects() -> None:
        async with lorry.connect(server.address, api_key=key) as service:
            assert (await service.get_server_capabilities_async()).supported_models[0].model_name == MODEL

    anyio.run(connects)


def test_usage_and_status_are_printed_from_the_database(server: Server) -> None:
    async def use() -> str:
        async with lorry.connect(server.address, api_key=server.new_key("reported")) as service:
            training = await service.create_lora_training_client_async(MODEL, rank=4)
            await training.forward_backward([datum()], "cross_entropy")
            return training.model_id

    run = anyio.run(use)

    def printed(*words: str) -> str:
        command = [sys.executable, "-m", "lorry", *words, "--data", str(server.data)]
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    (line,) = [line for line in printed("usage", "--tenant", "reported").splitlines() if "reported" in line]
    assert [word for word in line.split() if word != "│"] == ["reported", run, MODEL, "train", "12", "0.000000"]
    status = printed("status")
    assert f"{MODEL}#0" in status and "ready" in status and run in status


@pytest.fixture(scope="module")
def public_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """Of two models, one a mixture of experts, beyond loopback; with the address where it is reached from here, and its
    public key."""
    data, mixture = tmp_path_factory.mktemp("public"), tmp_path_factory.mktemp("mixture")
    tiny_qwen3_moe(vocab_size=VOCAB).save_pretrained(mixture)
    for file in BASE_MODEL.glob("token*"):
        shutil.copy(file, mixture)
    keys = next(keys for keys in iter(CurveKeys.generate, None) if re.search(rb"\[[a-z].*\]", keys.public))
    (data / "curve.key").write_bytes(keys.public + b"\n" + keys.secret + b"\n")  # rich would take it for markup
    server = start_server(data, "--bind", "tcp://0.0.0.0:*", "--model", f"mixture={mixture}")
    assert server.process.stdout is not None
    yield server, server.address.replace("0.0.0.0", "127.0.0.1"), server.process.stdout.readline().split("'")[1]
    server.stop()


async def test_two_base_models_are_served_side_by_side(public_server: tuple[Server, str, str]) -> None:
    server, address, server_key = public_server
    async with lorry.connect(address, api_key=server.new_key("both"), server_key=server_key) as service:
        models = (await service.get_server_capabilities_async()).supported_models
        assert {model.model_name for model in models} == {MODEL, "mixture"}
        for model in models:
            training = await service.create_lora_training_client_async(model.model_name, rank=4)
            assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0


async def test_a_run_on_a_mixtures_experts_outlives_its_actor_and_samples(
    public_server: tuple[Server, str, str],
) -> None:
    server, address, server_key = public_server
    async with lorry.connect(address, api_key=server.new_key("experts"), server_key=server_key) as service:
        losses: list[list[float]] = []
        for kills in (False, True):
            training = await service.create_lora_training_client_async("mixture", rank=4, seed=1)
            mine: list[float] = []
            for step in range(3):
                mine.append((await training.forward_backward([datum()], "cross_entropy")).metrics["loss:sum"])
                if kills and step == 1:
                    (actor,) = (p for p in family(server) if "mixture#0" in p.cmdline())
                    actor.kill()
                await training.optim_step(lorry.AdamParams(learning_rate=1e-2))
            losses.append(mine)
            sampler = await training.save_weights_and_get_sampling_client_async()
            prompt = lorry.ModelInput.from_ints([1, 2, 3])
            sampled = await sampler.sample_async(prompt, 1, lorry.SamplingParams(max_tokens=4, stop=[]))
            assert len(sampled.sequences[0].tokens) == 4
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert losses[0][2] < losses[0][0]


async def test_a_server_beyond_loopback_is_encrypted(public_server: tuple[Server, str, str]) -> None:
    server, address, server_key = public_server
    key = server.new_key("remote")
    async with lorry.connect(address, api_key=key, server_key=server_key) as service:
        assert (await service.get_server_capabilities_async()).supported_models
    with pytest.raises(lorry.ConnectionLostError):
        async with lorry.connect(address, api_key=key, timeout_s=1):
            pytest.fail("connected in the clear")


async def test_the_embedded_service_leaves_nothing_behind() -> None:
    before = set(psutil.Process().children(recursive=True))
    async with lorry.local(f"{MODEL}={BASE_MODEL}") as service:
        training = await service.create_lora_training_client_async(MODEL, rank=2)
        assert (await training.forward([datum()], "cross_entropy")).metrics["loss:sum"] > 0
        children = set(psutil.Process().children(recursive=True)) - before
        assert len(children) == 2
    assert not [child for child in children if child.is_running()]
