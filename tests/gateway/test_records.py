"""What the SDK's RestClient and the `tinker` command find out and change."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
from safetensors import safe_open

from .conftest import Tenant


def test_checkpoints_are_listed_published_expired_copied_and_deleted(tenant: Tenant) -> None:
    seen = tenant.run("checkpoints")
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
    assert seen["rank"] == 4
    assert seen["storage"] == 3


def test_sessions_are_found_with_what_was_made_in_them(tenant: Tenant) -> None:
    seen = tenant.run("sessions")
    assert seen["runs"] == [seen["model_id"]]
    assert seen["metadata"] == {"project": "x"}
    assert seen["session"] in seen["listed"]
    assert seen["active"] == [[seen["session"], "active"]]
    assert seen["over"] == ["success"]
    assert seen["whoami"].startswith("lorry:tenant:user-")


def test_tokens_are_billed_by_the_hour(tenant: Tenant) -> None:
    seen = tenant.run("billing")
    assert seen["events"] == [["training", seen["tokens"]]]


def test_the_tinker_command_lists_shows_downloads_and_deletes(tenant: Tenant, tmp_path: Path) -> None:
    path = tenant.run("resume")["path"]
    run = path.removeprefix("tinker://").partition("/")[0]
    assert run in {found["training_run_id"] for found in json.loads(tenant.tinker("-f", "json", "run", "list"))["runs"]}
    assert run in tenant.tinker("run", "info", run)
    assert "middle" in tenant.tinker("checkpoint", "list", "--run-id", run)
    assert "training" in tenant.tinker("checkpoint", "info", path)
    tenant.tinker("checkpoint", "download", path, "--output", str(tmp_path))
    (weights,) = tmp_path.rglob("adapter_model.safetensors")
    with safe_open(weights, "np") as file:
        assert any("lora_A" in name for name in file.keys())  # noqa: SIM118 - it is no dict
    tenant.tinker("checkpoint", "delete", "--yes", path)
    assert "middle" not in tenant.tinker("checkpoint", "list", "--run-id", run)


def test_a_link_serves_its_file_until_it_expires_and_nothing_else(tenant: Tenant) -> None:
    with tenant.http() as http:
        path = tenant.run("resume")["path"]
        run, _, checkpoint = path.removeprefix("tinker://").partition("/")
        link = http.get(f"training_runs/{run}/checkpoints/{checkpoint}/archive").json()["url"]
    assert httpx.get(link).content[:512].strip(b"\0")
    assert httpx.get(link.replace("archive.tar", "adapter_model.safetensors")).status_code == 404
    assert httpx.get(link.replace("expires=", "expires=1")).status_code == 404
    assert httpx.get(link.replace(run.partition(":")[0], "somebody")).status_code == 404


def test_a_public_checkpoint_can_be_used_and_not_changed_by_others(new_tenant: Callable[[], Tenant]) -> None:
    owner, other = new_tenant(), new_tenant()
    sampled = owner.run("checkpoints")["sampled"]
    run, _, checkpoint = sampled.removeprefix("tinker://").partition("/")
    with other.http() as http:
        assert http.post("weights_info", json={"tinker_path": sampled}).status_code == 200
        assert http.delete(f"training_runs/{run}/checkpoints/{checkpoint}").status_code == 404
        assert http.delete(f"training_runs/{run}/checkpoints/{checkpoint}/publish").status_code == 404
    with owner.http() as http:
        assert http.delete(f"training_runs/{run}/checkpoints/{checkpoint}/publish").status_code == 204
    with other.http() as http:
        assert http.post("weights_info", json={"tinker_path": sampled}).status_code == 404
