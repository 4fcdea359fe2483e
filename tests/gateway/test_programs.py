"""Scripts written for the hosted service run here, unmodified."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import children_of, start_server

from .conftest import OLD_SDK, Tenant, finish


def kept(tenant: Tenant, run: str) -> list[dict[str, float]]:
    """The numbers of each of a run's steps."""
    with tenant.http() as http:
        points = http.get(f"training_runs/{run}/metrics").json()["points"]
    assert [(point["step"], point["source"]) for point in points] == [(i, "training") for i in range(len(points))]
    return [point["values"] for point in points]


def test_a_supervised_loop_learns(tenant: Tenant) -> None:
    seen = tenant.run("training.supervised")
    assert seen["losses"][-1] < seen["losses"][0] / 2
    assert seen["outputs"] == seen["tokens"] - 1
    assert seen["first"] == pytest.approx(-seen["sum_of_logprobs"], rel=1e-4)
    assert seen["models"] == ["jargon-1m"]
    assert [values["loss:sum"] for values in kept(tenant, seen["model_id"])] == seen["losses"]


def test_chunks_that_arrive_out_of_order_come_back_in_order(tenant: Tenant) -> None:
    seen = tenant.run("training.chunked")
    assert seen["shapes"] == [2 + i % 3 for i in range(1100)]
    assert list(seen["metrics"]) == ["loss:sum"]
    assert [values["loss:sum"] for values in kept(tenant, seen["model_id"])] == [seen["metrics"]["loss:sum"]]


def test_a_part_that_is_refused_leaves_what_the_other_parts_added_and_the_run_goes_on(tenant: Tenant) -> None:
    seen = tenant.run("training.part_refused")
    for part, said in enumerate(seen["said"]):
        assert f"In request {2 + 4 * part} of this run: data[0]" in said
        assert "stand until the next optim_step" in said
    assert seen["norms"][0] == pytest.approx(seen["norms"][1], rel=1e-3), "1,025 good datums both times"


def test_sparse_targets_are_dense_targets_in_fewer_bytes(tenant: Tenant) -> None:
    seen = tenant.run("tensors.wide_targets")
    assert seen["dense"] == pytest.approx(seen["narrow"], rel=1e-4)
    assert seen["sparse"] == pytest.approx(seen["narrow"], rel=1e-4)


def test_a_reinforcement_loop_samples_its_newest_weights_each_step(tenant: Tenant) -> None:
    seen = tenant.run("training.reinforcement")
    assert seen["rewards"][-1] > seen["rewards"][0]
    assert seen["sequence_ids"] == 6 * 32


def test_samplers_in_flight_take_on_the_newest_weights(tenant: Tenant) -> None:
    seen = tenant.run("training.in_flight")
    (first, fixed), (first_after, fixed_after, second) = seen["before"], seen["after"]
    assert first[1:] == pytest.approx(fixed[1:], rel=1e-4)
    assert fixed_after[1:] == pytest.approx(fixed[1:], rel=1e-4)
    assert first_after[1:] == pytest.approx(second[1:], rel=1e-4)
    assert first_after[1:] != pytest.approx(first[1:], rel=1e-3)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tenant: Tenant) -> None:
    seen = tenant.run("training.resume")
    assert seen["resumed"] == pytest.approx(seen["went_on"], rel=1e-4)
    assert seen["without_optimizer"][0] == pytest.approx(seen["went_on"][0], rel=1e-4)
    assert seen["without_optimizer"][2] != pytest.approx(seen["went_on"][2], rel=1e-4)
    assert seen["rank"] == 4


def test_a_state_is_loaded_onto_the_run_that_saved_it(tenant: Tenant) -> None:
    seen = tenant.run("training.load_onto_a_run")
    assert seen["loaded"] == seen["path"]
    assert seen["again"] == pytest.approx(seen["went_on"], rel=1e-4)
    assert seen["without_optimizer"][0] == pytest.approx(seen["went_on"][0], rel=1e-4)
    assert seen["without_optimizer"][2] != pytest.approx(seen["went_on"][2], rel=1e-4)


def test_a_custom_loss_has_the_gradient_of_its_built_in_twin(tenant: Tenant) -> None:
    seen = tenant.run("tensors.custom_loss")
    assert seen["custom"] == pytest.approx(seen["built_in"], rel=1e-3)
    assert seen["traced"] == pytest.approx(seen["built_in"], rel=1e-3)
    assert seen["custom_mine"] == 1.0
    assert seen["traced_sum"] == seen["traced_traced_sum"] == pytest.approx(seen["built_in_sum"], rel=1e-5)


def test_what_is_wrong_with_a_custom_loss_is_told_and_the_run_goes_on(tenant: Tenant) -> None:
    seen = tenant.run("tensors.custom_loss_mistakes")
    assert "'torch.matmul', expected a function that a loss on the server may call" in seen["said"]["product"]
    assert "data[0]: operator.mul of node mul" in seen["said"]["misshapen"]
    assert "expected what create_custom_loss answered" in seen["said"]["forged"]
    assert seen["outputs"] == 1


def test_sampling_honours_every_parameter(tenant: Tenant) -> None:
    seen = tenant.run("sampling.every_parameter")
    assert len(seen["greedy"]) == 6
    assert seen["stopped"] == seen["greedy"][:3]
    assert seen["stop_reason"] == "stop"
    assert seen["seeded"][0] == seen["seeded"][1]
    for text in (seen["stopped_by_word"], seen["stopped_by_words"]):
        assert seen["word"] in text
    assert seen["unstopped"] == [6, 6, 6, 6]
    assert seen["prompt_logprobs"][0] is None
    assert seen["prompt_logprobs"][1:] == pytest.approx(seen["trained_logprobs"], abs=1e-3)
    assert seen["topk_prompt"] == [None, *[3] * (len(seen["prompt_logprobs"]) - 1)]
    assert seen["topk_sample"] == [2, 2, 2]
    assert seen["last_two"][:-2] == [None] * (len(seen["last_two"]) - 2)
    assert seen["last_two"][-2:] == pytest.approx(seen["prompt_logprobs"][-2:], abs=1e-4)


def test_other_tokens_of_the_prompt_are_scored_and_drawn(tenant: Tenant) -> None:
    seen = tenant.run("sampling.other_tokens")
    own = seen["prompt_logprobs"][1:]
    assert [row[0] for row in seen["dense"]] == pytest.approx(own, abs=1e-4)
    assert [row[1] for row in seen["dense"]] == [0.0] * len(own)
    assert seen["sparse_values"] == pytest.approx([own[1], own[3]], abs=1e-4)
    assert seen["sparse_rows"] == [0, 0, 1, 1, 2, *[2] * (len(own) - 4)]
    assert seen["sparse_columns"] == [2, 0]
    assert seen["alternatives"] == [len(own), 3]
    assert seen["alternatives_again"]
    assert seen["alternative_scores"] == pytest.approx(seen["alternative_logprobs"], abs=1e-4)
    assert "prompt_alt_tokens_k" in seen["too_many"]
    assert "target_prompt_logprobs" in seen["wrong_rows"]


def test_sixty_four_samples_at_once_all_come_back(tenant: Tenant) -> None:
    seen = tenant.run("sampling.crowd")
    assert seen["lengths"] == [8] * 64
    assert seen["clone"].endswith(":1000000000:0")  # the second client of a sampler counts from there


def test_a_sampler_of_saved_weights_is_one_sampler_however_it_is_reached(tenant: Tenant) -> None:
    seen = tenant.run("sampling.twins")
    assert seen["tokens"][0] == seen["tokens"][1] == seen["tokens"][2]
    assert seen["base_models"] == ["jargon-1m"] * 3
    assert seen["found"] == [seen["sampler_id"], "jargon-1m", seen["path"]]


def test_mistakes_raise_what_the_sdk_has_for_them(tenant: Tenant) -> None:
    seen = tenant.run("records.mistakes")
    of_a_run = {name: seen.pop(name) for name in ("token_out_of_range", "image")}
    assert all(found[:2] == ["RequestFailedError", None] for found in of_a_run.values())
    assert "target_tokens" in of_a_run["token_out_of_range"][2]
    assert "image" in of_a_run["image"][2]
    assert {name: found[1] for name, found in seen.items()} == {
        "unknown_model": 400,
        "rank_too_large": 400,
        "dimuon": 400,
        "no_such_checkpoint": 404,
        "foreign_run": 404,
    }


def test_a_wrong_key_is_refused(tenant: Tenant) -> None:
    process = Tenant(tenant.server, "tml-nobody").start("training.supervised")
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "AuthenticationError" in errors


def test_a_tenant_sees_nothing_of_another(new_tenant: Callable[[], Tenant]) -> None:
    mine = new_tenant().run("training.resume")
    run = mine["path"].removeprefix("tinker://").partition("/")[0]
    seen = new_tenant().run("records.foreign", mine["path"], run, run.partition(":")[0])
    assert seen.pop("listed") == []
    assert seen == dict.fromkeys(("run", "checkpoints", "session", "delete", "load"), 404)


def test_a_checkpoint_of_another_account_is_read_with_a_key_of_that(new_tenant: Callable[[], Tenant]) -> None:
    owner, stranger, other = new_tenant(), new_tenant(), new_tenant()
    path = owner.run("training.resume")["path"]
    seen = other.run("records.borrowed", path, "tml-nobody", "eyJ0.x.y", stranger.key, owner.key)
    for said in seen["said"][:2]:
        assert "weights_access_token is 'none', expected a key, or a token, of the account" in said
    assert "It does not exist, has expired, or belongs to another tenant" in seen["said"][2]
    assert seen["loaded"] == path
    assert seen["losses"][0] == pytest.approx(seen["losses"][1], rel=1e-4)
    assert seen["copied"] != path


@pytest.mark.long
def test_a_restart_in_mid_run_is_a_pause(tmp_path: Path) -> None:
    """First the gateway dies, then the broker: the script notices neither."""
    server = start_server(tmp_path, "--http", "127.0.0.1:0", "--heartbeat-s", "2")
    try:
        tenant = Tenant(server, server.new_key("me"))
        process = tenant.start("training.long_run", "30")
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        children = children_of(server.process.pid)
        os.kill(children["gateway"], signal.SIGKILL)
        os.kill(children["broker"], signal.SIGKILL)
        losses = finish(process)["losses"]
        assert len(losses) == 31
        assert losses[-1] < losses[0] / 2
    finally:
        server.stop()


@pytest.mark.skipif(not OLD_SDK.exists(), reason="`make test` installs it, plain pytest does not")
@pytest.mark.parametrize(
    "program",
    [
        "training.supervised",
        "training.chunked",
        "training.reinforcement",
        "training.resume",
        "sampling.every_parameter",
        "sampling.crowd",
    ],
)
def test_the_oldest_sdk_that_the_cookbook_takes_runs_the_same_programs(tenant: Tenant, program: str) -> None:
    seen = replace(tenant, sdk=OLD_SDK).run(program)
    assert {"losses", "shapes", "rewards", "resumed", "seeded", "lengths"} & seen.keys()
