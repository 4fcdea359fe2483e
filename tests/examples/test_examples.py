"""Each example shows what it says it does: all five at once, as tenants of one service."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from anyio import to_thread

import lorry
from tests.conftest import ROOT, Server

OPTIONS = {
    "supervised": ["--steps", "25"],
    "grpo": ["--steps", "16", "--questions", "16"],
    "dpo": ["--steps", "10"],
    "distillation": ["--questions", "24", "--steps", "32"],
    "sweep": ["--steps", "5", "--project", "a-sweep"],
}


NUMBERS = {"supervised": "accuracy", "grpo": "reward", "dpo": "margin", "distillation": "reverse_kl", "sweep": "loss"}
"""What each keeps with its run, by name."""


@pytest.fixture(scope="module")
def keys(server: Server) -> dict[str, str]:
    return {name: server.new_key(f"of-{name}") for name in OPTIONS}


@pytest.fixture(scope="module")
def running(server: Server, keys: dict[str, str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    processes: dict[str, subprocess.Popen[str]] = {}
    for name, options in OPTIONS.items():
        environment = os.environ | {"LORRY_ADDRESS": server.address, "LORRY_API_KEY": keys[name]}
        command = [sys.executable, f"examples/{name}.py", *options]
        processes[name] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def ended(running: dict[str, subprocess.Popen[str]], name: str) -> dict[str, Any]:
    """What the example printed last."""
    out, err = running[name].communicate()
    assert running[name].returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_supervised_answers_questions_that_it_never_saw(running: dict[str, subprocess.Popen[str]]) -> None:
    shown = ended(running, "supervised")
    (first, last), (before, after) = shown["loss"], shown["accuracy"]
    assert last < first / 10
    assert before < 0.1 and after > 0.7


def test_rewards_rise_with_grpo(running: dict[str, subprocess.Popen[str]]) -> None:
    before, after = ended(running, "grpo")["reward"]
    assert after > before + 0.03


def test_dpo_prefers_what_was_preferred_among_pairs_that_it_never_saw(
    running: dict[str, subprocess.Popen[str]],
) -> None:
    shown = ended(running, "dpo")
    before, after = shown["margin"]
    assert before == 0 and after > 0.3
    assert shown["accuracy"] > 0.5


def test_a_student_comes_near_its_teacher(running: dict[str, subprocess.Popen[str]]) -> None:
    shown = ended(running, "distillation")
    before, after = shown["reverse_kl"]
    assert after < 0.8 * before
    before, after = shown["accuracy"]
    assert after > before + 0.1


def test_a_sweep_trains_twenty_runs_and_tells_the_best(running: dict[str, subprocess.Popen[str]]) -> None:
    shown = ended(running, "sweep")
    best, worst = shown["loss"]
    assert shown["runs"] == 20
    assert best < 1 < worst
    assert shown["best"].keys() == {"rank", "learning_rate"}


@pytest.mark.parametrize("name", OPTIONS)
async def test_the_numbers_of_each_are_kept_with_its_run(
    name: str, server: Server, keys: dict[str, str], running: dict[str, subprocess.Popen[str]]
) -> None:
    await to_thread.run_sync(running[name].wait)
    async with lorry.connect(server.address, api_key=keys[name]) as service:
        rest = service.create_rest_client()
        runs = await rest.list_training_runs_async()
        kept = [number for run in runs for number in await rest.list_metric_names_async(run.training_run_id)]
    assert NUMBERS[name] in kept
