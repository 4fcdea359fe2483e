"""tinker-cookbook, unchanged, against a model that is served under the name of one that it knows. `make cookbook`.

The cookbook runs in an environment of its own, because it pins an older transformers; nothing of it needs the network.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASE_MODEL, ROOT, Server, start_server

PYTHON = ROOT / "build/cookbook/bin/python"
MODEL = "Qwen/Qwen3-8B"
REVISION = "0" * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server"), "--http", "127.0.0.1:0", model=f"{MODEL}={BASE_MODEL}")
    yield server
    assert server.stop() in (0, 130)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache, as a download would have left it, with the served model's tokenizer under its public name."""
    return hub_of(MODEL, BASE_MODEL, tmp_path_factory.mktemp("hub"))


def hub_of(model: str, folder: Path, home: Path) -> Path:
    repository = home / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja"):
            (snapshot / file.name).symlink_to(file)
    return home


def run(server: Server, hub: Path, program: str, folder: Path) -> dict[str, Any]:
    """What the program printed last. Fails with its errors where it fails."""
    environment = os.environ | {
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": server.new_key(program),
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [PYTHON, ROOT / "tests/cookbook/programs.py", program, folder],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_its_supervised_trainer_learns_a_conversations_file_and_resumes(
    server: Server, hub: Path, tmp_path: Path
) -> None:
    questions = {"What is a carrier?": "Who carries the cargo.", "And a lorry?": "A truck that carries many adapters."}
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in questions.items()
    ]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    seen = run(server, hub, "supervised", tmp_path)
    assert seen["stopped_at"] == [3, 0]  # six steps of two batches an epoch
    assert len(seen["nll"]) == 10
    assert seen["nll"][-1] < seen["nll"][0] / 2
    assert seen["nll"][6] < seen["nll"][4], "it went on from where it was, not from the start"
    assert seen["checkpoints"] == ["000003", "final", "000006", "000009", "final"]


def test_its_reinforcement_trainer_raises_the_reward_of_a_verifiable_environment(
    server: Server, hub: Path, tmp_path: Path
) -> None:
    seen = run(server, hub, "reinforcement", tmp_path)
    first, last = sum(seen["rewards"][:2]) / 2, sum(seen["rewards"][-2:]) / 2
    assert len(seen["rewards"]) == 8
    assert last > first + 0.2, seen["rewards"]
    assert seen["checkpoints"] == ["000004", "000008", "final"]


def test_its_checkpoint_helpers_save_find_resume_and_list(server: Server, hub: Path, tmp_path: Path) -> None:
    seen = run(server, hub, "checkpoints", tmp_path)
    assert seen["found"] == [1, "x", seen["paths"][0]]
    assert seen["renderer"] == "qwen3"
    assert seen["tokenizers_agree"]
    assert seen["resumed"] == pytest.approx(seen["went_on"], rel=1e-4)
    names = sorted(path.rpartition("/")[2] for path in seen["listed"])
    assert names == ["final", "final", "one", "one"], "rolling checkpoints are gone"
