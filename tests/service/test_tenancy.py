"""`lorry tenants` and `lorry keys`, beside a service and on a folder that nobody serves; and the first key of all."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

import lorry
from lorry.client.connection import open_connection
from lorry.wire.admin_messages import Administer, ListTenants, TenantInfo
from tests.conftest import LORRY, MODEL, Server, Start


def told(data: Path, *arguments: str, columns: int = 80) -> str:
    """What `lorry` prints of this folder."""
    environment = os.environ | {"COLUMNS": str(columns)}
    command = [*LORRY, *arguments, "--data", str(data)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout


def refused(data: Path, *arguments: str) -> str:
    ended = subprocess.run([*LORRY, *arguments, "--data", str(data)], text=True, capture_output=True, check=False)
    assert ended.returncode == 78
    (line,) = ended.stderr.splitlines()
    return line


async def test_the_first_start_prints_an_administrators_key_and_no_other_does(start: Start) -> None:
    first = start()
    assert first.process.stdout is not None
    line = first.process.stdout.readline().strip()
    assert line.startswith("Administrator's key, shown this once: tml-")
    async with open_connection(first.address, line.split()[-1]) as boss:
        (admin,) = await boss.ask(Administer(boss.next_request(), ListTenants()), list[TenantInfo])
        assert admin.tenant == "admin"
    first.stop()
    second = start()
    second.process.send_signal(signal.SIGINT)
    assert "Administrator" not in second.process.communicate()[0]


async def test_a_command_beside_a_service_reaches_it_wherever_it_listens(server: Server) -> None:
    key = told(server.data, "keys", "create", "--tenant", "ward", "--name", "lap top").strip()
    (info,) = json.loads(told(server.data, "keys", "ls", "--tenant", "ward", "--json"))
    assert (info["name"], info["scopes"]) == ("lap top", ["train", "sample", "read"])
    assert told(server.data, "tenants", "set", "ward", "--weight", "2.5") == "ward has a weight of 2.5.\n"
    async with lorry.connect(server.address, api_key=key) as client:
        training = await client.create_lora_training_client_async(MODEL, rank=4)
        assert told(server.data, "keys", "revoke", info["key"]) == f"{info['key']} opens nothing any more.\n"
        with pytest.raises(lorry.AuthenticationError, match="was revoked"):
            while True:  # the connection may hear of it after the command has ended
                await training.get_info_async()
    said = told(server.data, "limits", "set", "--tenant", "ward", "--rank", "8", "--model", "a", "--model", "b")
    assert said == "tenant:ward: rank 8, models a b.\n"
    assert {"holder": "tenant:ward", "limits": {"rank": 8, "models": ["a", "b"]}} in json.loads(
        told(server.data, "limits", "ls", "--json")
    )
    found = {each["tenant"]: each for each in json.loads(told(server.data, "tenants", "ls", "--json"))}
    assert (found["ward"]["weight"], found["ward"]["keys"]) == (2.5, 0)
    assert "there is no key 'key-0'" in refused(server.data, "keys", "revoke", "key-0")


def test_the_same_commands_work_on_a_folder_that_nobody_serves(tmp_path: Path) -> None:
    assert "where no Lorry has served yet" in refused(tmp_path, "keys", "ls")
    told(tmp_path, "keys", "create", "--tenant", "ann", "--scope", "read", "--expires", "2100-01-02")
    (info,) = json.loads(told(tmp_path, "keys", "ls", "--json"))
    assert info["scopes"] == ["read"]
    told(tmp_path, "tenants", "create", "bob")
    told(tmp_path, "tenants", "rm", "ann")
    lines = told(tmp_path, "keys", "ls").splitlines() + told(tmp_path, "tenants", "ls").splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(info["key"] in line and "revoked" in line for line in lines)
    assert (
        told(tmp_path, "limits", "set", "--runs", "3", "--monthly-usd", "50") == "everyone: runs 3, monthly_usd 50.0.\n"
    )
    assert "everyone" in told(tmp_path, "limits", "ls")
    assert "there is no tenant 'ann'" in refused(tmp_path, "limits", "set", "--tenant", "ann")
    assert "there is no tenant 'ann'" in refused(tmp_path, "tenants", "set", "ann", "--weight", "1")
    for limit in (("--requests-per-s", "0"), ("--monthly-usd", "2e9"), ("--rank", str(2**60))):
        assert "limits: Expected" in refused(tmp_path, "limits", "set", *limit)
    assert "everyone" in told(tmp_path, "limits", "ls"), "what is there can be read still"
    assert "tenant 'ann' was removed" in refused(tmp_path, "keys", "create", "--tenant", "ann")
    assert "weight is 0.0, expected a number from 0.001" in refused(
        tmp_path, "tenants", "create", "eve", "--weight", "0"
    )
    assert "tenant is 'a b'" in refused(tmp_path, "keys", "create", "--tenant", "a b")


def test_deeds_are_told_whole(tmp_path: Path) -> None:
    told(tmp_path, "keys", "create", "--tenant", "ann", "--name", "laptop")
    (event,) = json.loads(told(tmp_path, "audit", "--json"))
    assert (event["event"], event["tenant"], event["by"]) == ("key_created", "ann", "operator")
    lines = told(tmp_path, "audit", "--tenant", "ann").splitlines()
    assert all(len(line) <= 80 for line in lines)
    (column,) = ("".join(line.split("│")[5].strip() for line in lines if line.startswith("│")),)
    assert event["subject"] in column
    assert "laptop" in column
    assert "key_created" not in told(tmp_path, "audit", "--since", "2100-01-01")
