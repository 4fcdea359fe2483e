"""The `tinker` command, many times in one process: starting it anew for each would cost a second every time."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import tinker
from click.testing import CliRunner
from tinker.cli.__main__ import main_cli

from .shared import example, new_run, steps, tokens_of


def call(*arguments: str, typed: str = "") -> str:
    """What the command prints; its errors are raised."""
    return CliRunner().invoke(main_cli, arguments, input=typed, catch_exceptions=False, standalone_mode=False).output


def in_json(*arguments: str) -> Any:
    return json.loads(call("-f", "json", *arguments))


def runs_and_checkpoints(folder: str) -> dict[str, Any]:
    training = new_run(tinker.ServiceClient())
    path, run = training.save_state("middle").result().path, training.model_id
    seen = {
        "run": run,
        "runs": [found["training_run_id"] for found in in_json("run", "list")["runs"]],
        "run_info": call("run", "info", run),
        "checkpoints": call("checkpoint", "list", "--run-id", run),
        "checkpoint_info": call("checkpoint", "info", path),
    }
    call("checkpoint", "download", path, "--output", folder)
    call("checkpoint", "delete", "--yes", path)
    return seen | {"after_delete": call("checkpoint", "list", "--run-id", run)}


def push_to_hub(repository: str) -> dict[str, Any]:
    training = new_run(tinker.ServiceClient())
    path = training.save_state("pushed").result().path
    call("checkpoint", "push-hf", path, "--repo", repository)
    return {"path": path}


def everything(key: str) -> dict[str, Any]:
    """`HOME` is a folder of the test's: `auth login` writes there."""
    rest = tinker.RestClient()
    training = new_run(tinker.ServiceClient())
    steps(training, [example(tokens_of(training))], 1)
    path = training.save_state("one").result().path

    def checkpoint() -> Any:
        (found,) = rest.list_checkpoints(training.model_id).result().checkpoints
        return found

    def after(*command: str) -> list[bool]:
        call("checkpoint", *command)
        return [checkpoint().public, checkpoint().expires_at is not None]

    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    since, until = (hour + timedelta(hours=hours) for hours in (-1, 1))
    usage = in_json("billing", "usage", since.isoformat(), until.isoformat())
    return {
        "published": after("publish", path),
        "unpublished": after("unpublish", path),
        "with_ttl": after("set-ttl", path, "--ttl", "3600"),
        "without_ttl": after("set-ttl", path, "--remove"),
        "whoami": in_json("auth", "whoami")["user_urn"],
        "status": call("auth", "status"),
        "login": call("auth", "login", typed=f"{key}\n"),
        "logout": call("auth", "logout"),
        "models": call("model", "list"),
        "usage": [event["event_info"] for event in usage["data"]],
        "storage": in_json("billing", "checkpoint-storage")["data"],
        "size": checkpoint().size_bytes,
        "tokens": len(tokens_of(training)) - 1,
    }
