"""What the SDK's RestClient and the `tinker` command find out and change."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from safetensors import safe_open
from safetensors.numpy import load
from sqlite_utils import Database

from lorry.scheduler.planning.prices import cost
from lorry.storage.connection import FILE
from lorry.storage.reports import usage
from lorry.storage.store import Store
from lorry.wire.ids import TenantId

from .conftest import Tenant
from .hub import hub


def test_checkpoints_are_listed_published_expired_copied_and_deleted(tenant: Tenant) -> None:
    seen = tenant.run("records.checkpoints")
    run = f"tinker://{seen['model_id']}"
    assert seen["listed"] == {
        f"{run}/weights/kept": ["training", False, True],
        f"{run}/sampler_weights/out": ["sampler", True, True],
        f"{run}/external_weights/take": ["external", False, False],
    }
    assert seen["metadata"] == [{"note": "a"}]
    assert set(seen["left"]) == {seen["saved"], seen["sampled"], seen["copied"]}
    assert seen["copied"] not in (seen["saved"], seen["sampled"])
    assert seen["last"] == [seen["saved"], seen["sampled"]]
    assert seen["same_run"] == seen["model_id"]
    assert seen["archived"] not in seen["left"]
    assert seen["rank"] == 4
    assert seen["storage"] == 3
    assert seen["audit"] == [
        ["checkpoint_created", seen["saved"]],
        ["checkpoint_created", seen["sampled"]],
        ["checkpoint_created", f"{run}/external_weights/take"],
        ["checkpoint_read", f"{run}/external_weights/take"],
        ["checkpoint_expiry_set", seen["saved"]],
        ["checkpoint_published", seen["sampled"]],
        ["checkpoint_copied", seen["copied"]],
        ["checkpoint_deleted", f"{run}/external_weights/take"],
        ["checkpoint_copied", seen["archived"]],
        ["checkpoint_deleted", seen["archived"]],
    ]


def test_sessions_are_found_with_what_was_made_in_them(tenant: Tenant) -> None:
    seen = tenant.run("records.sessions")
    assert seen["runs"] == [seen["model_id"]]
    assert seen["metadata"] == {"project": "x"}
    assert seen["session"] in seen["listed"]
    assert seen["active"] == [[seen["session"], "active"]]
    assert seen["over"] == ["success"]
    assert seen["whoami"].startswith("lorry:tenant:user-")


def test_sessions_are_put_into_projects_and_moved(tenant: Tenant) -> None:
    seen = tenant.run("records.projects")
    assert seen["born_in"] == ["birds"]
    assert seen["found"] == [seen["session"]]
    assert sorted(seen["runs"]) == sorted([seen["model_id"], f"{seen['session']}:train:1"])
    assert seen["birds"] == []
    assert seen["used"] == ["birds", "owls"], "what was used stays where it was used"
    assert seen["stored"] == ["nests", "owls"]
    assert seen["nests"] == [seen["copied"]]
    mistakes = seen["mistakes"]
    assert mistakes["name"].startswith("400: ")
    assert "project is '../x', expected 1 to 128 letters" in mistakes["name"]
    assert mistakes["session"].startswith("404: ")
    assert mistakes["search"].startswith("404: ")
    assert "there is no project 'eagles'" in mistakes["runs"]
    with tenant.http() as http:
        sought = http.get("training_runs", params={"user_metadata": "arm=b"}).json()["training_runs"]
        assert [run["training_run_id"] for run in sought] == [f"{seen['session']}:train:1"]
        assert http.get("training_runs", params={"user_metadata": "arm"}).status_code == 400
    table = tenant.lorry("usage", "--by", "project", "--run", seen["model_id"])
    assert [name for name in ("birds", "owls", "nests") if f" {name} " in table] == ["birds", "owls"]


def test_storage_is_billed_and_checkpoints_go_many_at_once(tenant: Tenant) -> None:
    seen = tenant.run("records.storage")
    assert seen["rate"] == 0.2
    assert seen["monthly"] == pytest.approx(0.2 * seen["bytes"] / 1e9, rel=1e-9)
    assert 0 < seen["gigabyte_hours"] < seen["bytes"] / 1e9, "less than an hour"
    assert set(seen["free"]) == {False}
    assert seen["cost"] == pytest.approx(0.2 * seen["gigabyte_hours"] / 720, rel=1e-3, abs=1e-11)
    with tenant.http() as http:
        body = {"training_run_id": seen["model_id"], "but_newest": 1}
        told = http.post("checkpoints/delete", json=body | {"only_tell": True}).json()["checkpoints"]
        gone = http.post("checkpoints/delete", json=body).json()["checkpoints"]
        assert [each["checkpoint_id"] for each in gone] == ["weights/a", "weights/b"]
        assert gone == told
        assert http.post("checkpoints/delete", json={}).status_code == 400
        for wrong in (0, 10**12, 10**20):
            place = f"training_runs/{seen['model_id']}/checkpoints/weights/c/ttl"
            assert http.put(place, json={"ttl_seconds": wrong}).status_code == 400
        assert http.post("checkpoints/delete", json={"everything": True}).status_code == 422
        left = http.get("checkpoints").json()["checkpoints"]
        assert [each["checkpoint_id"] for each in left] == ["weights/c"]
    assert " storage " in tenant.lorry("usage", "--by", "kind", "--run", seen["model_id"])


def test_a_client_says_within_which_time_it_wants_what_it_asks_for(tenant: Tenant) -> None:
    seen = tenant.run("records.in_time")
    assert len(seen["losses"]) == 2
    assert "was not over 0.2 s after it was accepted" in seen["said"]


def test_tokens_are_billed_by_the_hour(tenant: Tenant) -> None:
    seen = tenant.run("records.billing")
    assert seen["events"] == [["training", seen["tokens"]]]
    assert seen["rates"] == [0.44]
    assert seen["costs"] == [pytest.approx(0.44 * seen["tokens"] / 1e6, rel=1e-12)]
    assert seen["sessions"] == {seen["session"]: {"grant": "x"}}
    (line,) = [line for line in tenant.lorry("usage").splitlines() if f" {seen['session']}:train:0 " in line]
    assert line.split()[-2] == f"{0.44 * seen['tokens'] / 1e6:.6f}"


def test_prompts_that_were_found_computed_are_billed_as_cached(tenant: Tenant) -> None:
    assert tenant.run("records.cached_prompts")["prefill"] == [[False, 40 + 8], [True, 32]]


def test_a_bill_that_is_recomputed_from_its_rows_is_the_one_that_was_recorded(tenant: Tenant) -> None:
    tenant.run("training.reinforcement")
    with tenant.http() as http:
        name = http.get("auth/apikey/me").json()["name"]
    rows = [row for row in Database(tenant.server.data / FILE).table("usage").rows if row["tenant"] == name]
    assert {(row["kind"], row["price"]) for row in rows} == {("train", 440_000), ("sample", 400_000), ("prefill", 0)}
    recomputed = sum(cost(row["tokens"], row["price"]) for row in rows)
    assert sum(row["cost"] for row in rows) == recomputed > 0
    store = Store(tenant.server.data)
    try:
        assert sum(row.cost_usd for row in usage(store, TenantId(name))) == pytest.approx(recomputed / 1e12, rel=1e-12)
    finally:
        store.close()


def test_the_tinker_command_lists_shows_downloads_and_deletes(tenant: Tenant, tmp_path: Path) -> None:
    seen = tenant.run("commands.runs_and_checkpoints", str(tmp_path))
    assert seen["runs"] == [seen["run"]]
    assert seen["run"] in seen["run_info"]
    assert "middle" in seen["checkpoints"]
    assert "training" in seen["checkpoint_info"]
    assert "middle" not in seen["after_delete"]
    (weights,) = tmp_path.rglob("adapter_model.safetensors")
    with safe_open(weights, "np") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118 - it is no dict
    assert "tinker 0." in tenant.tinker("version"), "the command itself, once"


def test_the_tinker_command_publishes_expires_tells_who_you_are_and_what_you_used(
    tenant: Tenant, tmp_path: Path
) -> None:
    seen = replace(tenant, extra={"HOME": str(tmp_path)}).run("commands.everything", tenant.key)
    assert seen["published"] == [True, False]
    assert seen["unpublished"] == [False, False]
    assert seen["with_ttl"] == [False, True]
    assert seen["without_ttl"] == [False, False]
    assert seen["whoami"].startswith("lorry:tenant:user-")
    assert "Tinker accessible: yes" in seen["status"]
    assert "Logged in as user-" in seen["login"]
    assert "Removed credential" in seen["logout"]
    assert "jargon-1m" in seen["models"]
    used = [(event["type"], event["token_count"]) for event in seen["usage"] if event["type"] != "storage"]
    assert used == [("training", seen["tokens"])]
    assert [item["size_bytes"] for item in seen["storage"]] == [seen["size"]]


def test_the_tinker_command_pushes_a_checkpoint_to_a_hub(tenant: Tenant, tmp_path: Path) -> None:
    with hub() as (url, uploaded):
        extra = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        path = replace(tenant, extra=extra).run("commands.push_to_hub", "me/adapter")["path"]
    assert path in uploaded["README.md"].decode()
    assert json.loads(uploaded["adapter_config.json"])["peft_type"] == "LORA"
    assert any("lora_A" in name for name in load(uploaded["adapter_model.safetensors"]))


def test_a_link_serves_its_file_until_it_expires_and_nothing_else(tenant: Tenant) -> None:
    with tenant.http() as http:
        path = tenant.run("training.resume")["path"]
        run, _, checkpoint = path.removeprefix("tinker://").partition("/")
        link = http.get(f"training_runs/{run}/checkpoints/{checkpoint}/archive").json()["url"]
    assert httpx.get(link, timeout=None).content[:512].strip(b"\0")
    assert httpx.get(link.replace("archive.tar", "adapter_model.safetensors"), timeout=None).status_code == 404
    assert httpx.get(link.replace("expires=", "expires=1"), timeout=None).status_code == 404
    assert httpx.get(link.replace(run.partition(":")[0], "somebody"), timeout=None).status_code == 404


def test_a_public_checkpoint_can_be_used_and_not_changed_by_others(new_tenant: Callable[[], Tenant]) -> None:
    owner, other = new_tenant(), new_tenant()
    sampled = owner.run("records.checkpoints")["sampled"]
    run, _, checkpoint = sampled.removeprefix("tinker://").partition("/")
    with other.http() as http:
        assert http.post("weights_info", json={"tinker_path": sampled}).status_code == 200
        assert http.delete(f"training_runs/{run}/checkpoints/{checkpoint}").status_code == 404
        assert http.delete(f"training_runs/{run}/checkpoints/{checkpoint}/publish").status_code == 404
    with owner.http() as http:
        assert http.delete(f"training_runs/{run}/checkpoints/{checkpoint}/publish").status_code == 204
    with other.http() as http:
        assert http.post("weights_info", json={"tinker_path": sampled}).status_code == 404
