"""After any refusal the same run goes on: every place in the code that refuses is known here, or this fails."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest

import lorry.gateway.errors
import lorry.wire.errors
from lorry.gateway.app import running
from lorry.gateway.config import GatewayConfig
from lorry.wire.errors import LorryError
from tests.conftest import ROOT

from .conftest import Tenant
from .refusals import ADAM, MISTAKES, Mistake, Run, tensor

NO_COMMAND = "it refuses a question, a creation or a sample: these have no order, and leave no gap"
NO_PLACE = "what it refuses has no place in a run's order: there is no such run, seq, or readable request"
COMES_AGAIN = "it asks for the same request again, which keeps its seq"
AT_START = "it ends a process or a connection, not a request"
OUTCOME = "an actor's outcome like any other, shown in tests/actors: the broker ends its seq as the others'"
IS_OVER = "its command has a seq that is over, or ends with it: shown in tests/scheduler and tests/service"

LIMIT = (
    "each shown with both clients and followed by a right call: tests/scheduler/test_limits, tests/gateway/test_limits"
)
ADMINISTRATION = "an administrator's order, which no run sees: tests/scheduler/test_keys, tests/gateway/test_admin"
EXPORT = "an operator's command that no run sees: tests/actors/test_export"
IMPORT = "an operator's command that no run sees: tests/actors/test_foreign"
IMAGES = "an actor's outcome, each followed by a right call: tests/service/test_images"
SHARE = "its command is executed whole then, and ends as any: tests/actors/test_sharing, tests/scheduler/test_spreading"
CUSTOM = "as any mistake in a pass, once its loss came with it: tests/actors/test_custom_losses"
METRICS = "of numbers that are logged, which have no order: tests/scheduler/test_metrics"
CONSOLE = "of a form or a page, which have no order: tests/gateway/console"
TEXT = "of a request for text, which has no order: tests/gateway/test_openai, tests/gateway/test_anthropic"
ELSEWHERE: dict[str, tuple[int, str]] = {
    "wire/codec.py::decode": (1, NO_PLACE),  # a header above the limit, which no client of ours sends
    "wire/commands.py::check_lora_config": (7, f"{NO_COMMAND}; of a run made early: tests/service/test_waiting"),
    "wire/commands.py::check_sample": (8, NO_COMMAND),
    "wire/commands.py::_check_against_prompt": (2, NO_COMMAND),
    "wire/commands.py::_check_image": (1, "raised where the command is made, before its seq is used"),
    "wire/commands.py::_check_prompt_targets": (2, NO_COMMAND),
    "wire/commands.py::_check_stop": (1, NO_COMMAND),
    "wire/sockets.py::_channel": (1, AT_START),
    "wire/streaming.py::_new": (
        1,
        "told to who reads a sample that a new broker began anew: tests/wire/test_streaming",
    ),
    "client/connection.py::submit": (1, "raised where the command is made, before its seq is used"),
    "client/connection.py::_start": (2, "raised where the command is made, before its seq is used"),
    "client/connection.py::_give_up": (1, "sent to the broker as the command's end: tests/scheduler/test_client_door"),
    "client/connection.py::open": (1, AT_START),
    "client/connection.py::close": (1, AT_START),
    "client/operator.py::drain": (1, NO_COMMAND),
    "client/probe.py::probe": (1, NO_COMMAND),
    "storage/blobs.py::read": (2, "what the server's own disk has damaged: tests/storage/test_blobs"),
    "storage/connection.py::unusable": (2, AT_START),
    "storage/connection.py::_check_release": (2, "an operator's command that only looks: tests/storage/test_looking"),
    "storage/looking.py::looking": (2, "an operator's command that only looks: tests/storage/test_looking"),
    "storage/data_folder.py::make_private": (1, AT_START),
    "storage/data_folder.py::refused": (1, AT_START),
    "storage/lock.py::sole_writer": (1, AT_START),
    "scheduler/orders.py::_begin_drain": (1, ADMINISTRATION),
    "gateway/console/app.py::_install": (1, CONSOLE),
    "gateway/console/checkpoints.py::_change": (1, CONSOLE),
    "gateway/console/curves.py::curves": (1, CONSOLE),
    "gateway/console/forms.py::_form": (2, CONSOLE),
    "gateway/console/forms.py::number": (1, CONSOLE),
    "gateway/console/live.py::_asked": (1, CONSOLE),
    "gateway/console/playground.py::asked_of": (1, CONSOLE),
    "gateway/console/playground.py::_encoded": (1, CONSOLE),
    "gateway/console/runs.py::find": (1, CONSOLE),
    "gateway/console/runs.py::compare": (2, CONSOLE),
    "gateway/console/tenants.py::change_tenants": (1, CONSOLE),
    "gateway/console/tenants.py::change_tenant": (1, CONSOLE),
    "gateway/console/tenants.py::_shown": (1, CONSOLE),
    "gateway/console/tenants.py::limits_of": (1, CONSOLE),
    "gateway/console/visiting.py::check_own": (1, CONSOLE),
    "gateway/console/visiting.py::sign_in": (1, CONSOLE),
    "gateway/console/visiting.py::visiting": (1, CONSOLE),
    "scheduler/accepting.py::_resent": (1, IS_OVER),
    "scheduler/accepting.py::_plan_or_fail": (1, IS_OVER),
    "scheduler/accepting.py::_outcome": (1, IS_OVER),
    "scheduler/access/administration.py::checked": (2, ADMINISTRATION),
    "scheduler/access/administration.py::_check_key": (4, ADMINISTRATION),
    "scheduler/access/administration.py::no_key": (1, ADMINISTRATION),
    "scheduler/access/administration.py::no_tenant": (1, ADMINISTRATION),
    "scheduler/access/administration.py::no_holder": (1, ADMINISTRATION),
    "scheduler/access/administration.py::_missing": (1, ADMINISTRATION),
    "scheduler/access/administration.py::check_project": (1, NO_COMMAND),
    "scheduler/projects.py::checked": (1, NO_COMMAND),
    "scheduler/creating.py::_project": (1, NO_COMMAND),
    "scheduler/choosing.py::checked": (1, NO_COMMAND),
    "scheduler/admission.py::check_ttl": (1, NO_COMMAND),  # as a save's: tests/scheduler/test_retention
    "scheduler/catalogue.py::answer": (1, NO_COMMAND),
    "wire/codec.py::encode": (1, "of a body: tests/gateway/test_records"),
    "scheduler/creating.py::checked_priority": (1, NO_COMMAND),
    "scheduler/queueing.py::state": (1, NO_COMMAND),
    "scheduler/metrics.py::_new_names": (1, METRICS),
    "scheduler/metrics.py::latest": (1, METRICS),
    "client/metric_files.py::__init__": (1, METRICS),
    "gateway/tinker/run_metrics.py::exported": (1, METRICS),
    "scheduler/metrics.py::_read": (2, METRICS),
    "wire/metrics.py::check_points": (2, METRICS),
    "wire/metrics.py::point_of": (1, METRICS),
    "wire/metrics.py::_number": (1, METRICS),
    "wire/metrics.py::_count": (1, METRICS),
    "scheduler/commands.py::late": (1, IS_OVER),
    "scheduler/client_door.py::_cancel": (1, IS_OVER),
    "client/deadlines.py::time_left": (1, "nothing was sent, and no seq used: tests/scheduler/test_deadlines"),
    "scheduler/access/administration.py::_no_place_for": (2, ADMINISTRATION),
    "scheduler/access/administration.py::_unnameable": (1, ADMINISTRATION),
    "scheduler/client_door.py::_unreadable": (1, COMES_AGAIN),  # the disk is full
    "scheduler/planning/limits.py::check_pace": (1, f"{COMES_AGAIN}: tests/scheduler/test_limits"),
    "scheduler/planning/limits.py::check_queue": (1, f"{COMES_AGAIN}: tests/scheduler/test_limits"),
    "scheduler/planning/limits.py::_over": (1, LIMIT),
    "scheduler/access/keyring.py::carry_out": (1, ADMINISTRATION),
    "scheduler/access/keyring.py::over": (1, AT_START),
    "scheduler/access/keyring.py::revoke": (1, NO_COMMAND),
    "scheduler/access/keyring.py::revoked": (1, AT_START),
    "scheduler/access/permissions.py::_check": (1, f"{NO_PLACE} for this key: tests/scheduler/test_keys"),
    "scheduler/admission.py::check_place": (3, f"{NO_PLACE}; or {COMES_AGAIN}"),
    "scheduler/admission.py::admit": (
        3,
        "rows of a sample; timeouts: tests/scheduler/test_deadlines, streams of what is no sample:"
        " tests/scheduler/test_streams",
    ),
    "scheduler/admission.py::_check_save": (1, "a slot of a run without a session: tests/gateway/test_names"),
    "scheduler/actor_door.py::drain": (1, NO_COMMAND),
    "scheduler/actor_door.py::_told_to_leave": (1, NO_COMMAND),
    "scheduler/orders.py::obey": (2, NO_COMMAND),
    "scheduler/shelf.py::import_adapter": (2, NO_COMMAND),
    "scheduler/creating.py::imported": (2, NO_COMMAND),
    "scheduler/checkpoints.py::carry_out": (1, ADMINISTRATION),  # the disk is full
    "scheduler/client_door.py::_handle": (1, COMES_AGAIN),
    "scheduler/reception.py::_refuse_later": (1, f"{AT_START}: tests/scheduler/test_reception"),
    "scheduler/reception.py::hear": (2, f"{AT_START}: tests/scheduler/test_reception"),
    "scheduler/reception.py::_welcome": (1, f"{AT_START}: tests/scheduler/test_reception"),
    "scheduler/reception.py::_unknown": (1, AT_START),
    "scheduler/client_results.py::_send": (1, NO_COMMAND),
    "scheduler/creating.py::sampler": (1, NO_COMMAND),
    "scheduler/client_sessions.py::get": (1, NO_COMMAND),
    "scheduler/client_sessions.py::touch": (1, NO_COMMAND),
    "scheduler/commands.py::item": (2, IS_OVER),
    "scheduler/finishing.py::finish": (1, IS_OVER),
    "scheduler/models.py::known": (1, NO_COMMAND),
    "scheduler/planning/prices.py::parse_prices": (3, AT_START),
    "scheduler/recovering.py::actor_lost": (1, IS_OVER),
    "scheduler/recovering.py::_break": (1, IS_OVER),
    "scheduler/registry.py::run": (1, NO_PLACE),
    "scheduler/registry.py::sampler": (1, NO_PLACE),
    "scheduler/registry.py::lane": (1, NO_PLACE),
    "scheduler/registry.py::loadable": (1, "another base model's: tests/gateway/test_names"),
    "scheduler/saves.py::weights_gone": (1, NO_COMMAND),
    "gateway/listening.py::listen": (1, AT_START),
    "gateway/peers.py::trusted": (1, AT_START),
    "gateway/tls.py::certificate_of": (2, AT_START),
    "gateway/tls.py::_wrong": (3, AT_START),
    "gateway/bodies.py::read": (1, COMES_AGAIN),
    "gateway/bodies.py::_unpacked": (2, NO_PLACE),
    "gateway/broker.py::api_key": (1, NO_PLACE),
    "gateway/broker.py::_check_expiry": (1, NO_PLACE),
    "gateway/broker.py::_seconds": (1, "a mistake like another: test_a_timeout_that_is_no_number"),
    "gateway/broker.py::loaded": (1, COMES_AGAIN),
    "gateway/connections.py::use": (2, f"{COMES_AGAIN}: tests/gateway/test_guests"),
    "gateway/guests.py::try_": (2, f"{NO_PLACE}: tests/gateway/test_guests"),
    "gateway/errors.py::install": (1, COMES_AGAIN),
    "gateway/request_ids.py::parse": (1, NO_COMMAND),
    "gateway/tinker/billing.py::billing_usage": (1, NO_COMMAND),
    "gateway/tinker/downloads.py::download": (2, NO_COMMAND),
    "gateway/tinker/downloads.py::_folder": (1, NO_COMMAND),
    "gateway/tinker/downloads.py::_files": (1, NO_COMMAND),
    "gateway/tinker/models.py::create_model": (1, NO_COMMAND),
    "gateway/tinker/ordered.py::seq_of": (1, NO_PLACE),
    "gateway/tinker/ordered.py::_understood": (1, "a bug: test_a_bug_in_the_gateway_costs_its_request_alone"),
    "gateway/tinker/runs.py::get_training_run": (1, NO_COMMAND),
    "gateway/tinker/runs.py::_pairs": (1, NO_COMMAND),
    "gateway/tinker/sampling.py::asample": (1, NO_COMMAND),
    "gateway/tinker/sampling.py::_check_supported": (2, NO_COMMAND),
    "gateway/tinker/sampling.py::_prompt_targets": (1, NO_COMMAND),
    "gateway/tinker/sampling.py::_model_input": (1, NO_COMMAND),
    "gateway/tinker/sessions.py::get_session": (1, NO_COMMAND),
    "gateway/tinker/sessions.py::check_projects": (1, NO_COMMAND),
    "gateway/tinker/custom_losses.py::create_custom_loss": (1, NO_COMMAND),
    "gateway/tinker/custom_losses.py::id_of": (1, NO_COMMAND),
    "wire/commands.py::_spec": (1, CUSTOM),
    "wire/custom_loss.py::check_custom_loss": (5, CUSTOM),
    "wire/custom_loss.py::_check_inputs": (3, CUSTOM),
    "wire/custom_loss.py::_check_target": (4, CUSTOM),
    "wire/custom_loss.py::_check_output": (3, CUSTOM),
    "wire/custom_loss.py::_refs": (2, CUSTOM),
    "actors/training/custom_losses.py::check_shapes": (1, CUSTOM),
    "actors/training/custom_losses.py::_gradient": (1, CUSTOM),
    "actors/training/custom_losses.py::_run": (1, CUSTOM),
    "actors/training/custom_losses.py::_computed": (1, CUSTOM),
    "actors/training/custom_losses.py::_check_arguments": (1, CUSTOM),
    "actors/training/reading.py::_check_custom": (1, CUSTOM),
    "gateway/broker.py::borrow": (1, "a key that may not read: as any mistake in a load"),
    "gateway/tinker/weights.py::_load": (1, NO_PLACE),
    "gateway/anthropic/conversing.py::check": (4, TEXT),
    "gateway/anthropic/conversing.py::_continues": (1, TEXT),
    "gateway/anthropic/conversing.py::_part": (1, TEXT),
    "gateway/anthropic/messages.py::count_tokens": (1, TEXT),
    "gateway/chat/conversation.py::image_of": (2, TEXT),
    "gateway/chat/conversation.py::arguments_of": (1, TEXT),
    "gateway/chat/endpoint.py::_answered": (1, TEXT),
    "gateway/chat/endpoint.py::_handler": (2, TEXT),
    "gateway/chat/endpoint.py::_guarded": (2, TEXT),
    "gateway/chat/models.py::meant_by": (1, TEXT),
    "gateway/chat/models.py::no_model": (1, TEXT),
    "gateway/chat/preparing.py::checked": (2, TEXT),
    "gateway/chat/reading.py::read": (1, TEXT),
    "gateway/chat/reading.py::_told": (3, TEXT),
    "gateway/chat/rendering.py::check": (3, TEXT),
    "gateway/chat/rendering.py::with_thinking": (1, TEXT),
    "gateway/chat/rendering.py::with_images": (1, TEXT),
    "gateway/chat/tokenizers.py::render": (1, TEXT),
    "gateway/chat/tokenizers.py::get": (1, TEXT),
    "gateway/openai/completions.py::_check": (4, TEXT),
    "gateway/openai/completions.py::_prompts": (2, TEXT),
    "gateway/openai/messages.py::check": (2, TEXT),
    "gateway/openai/messages.py::_refuse_unless": (1, TEXT),
    "gateway/openai/messages.py::_part": (1, TEXT),
    "actors/actor.py::_check_division": (3, AT_START),
    "actors/group/dividing.py::check_divisible": (1, AT_START),
    "actors/group/models.py::divide": (1, AT_START),
    "actors/model/shards.py::_check_heads": (2, AT_START),
    "actors/model/sizing.py::of_rank": (1, AT_START),
    "actors/model/shards.py::_shard": (1, AT_START),
    "actors/actor.py::_check_device": (1, AT_START),
    "actors/actor.py::_load_tokenizer": (1, AT_START),
    "actors/actor.py::_told": (1, AT_START),
    "actors/actor.py::join": (1, AT_START),
    "actors/actor.py::_handle": (1, AT_START),
    "actors/actor.py::heartbeat": (1, AT_START),
    "actors/adapters/checkpoints.py::read_vectors": (2, OUTCOME),
    "actors/adapters/checkpoints.py::load_sampler_weights": (1, NO_COMMAND),
    "actors/adapters/checkpoints.py::_read_weights": (1, OUTCOME),
    "actors/adapters/checkpoints.py::read_factors": (1, OUTCOME),
    "actors/adapters/checkpoints.py::_flat": (1, OUTCOME),
    "actors/adapters/folders.py::verify": (1, OUTCOME),
    "actors/adapters/foreign.py::_config": (1, IMPORT),
    "actors/adapters/foreign.py::_checked": (5, IMPORT),
    "actors/adapters/foreign.py::read_foreign": (3, IMPORT),
    "actors/adapters/folders.py::read_json": (2, OUTCOME),
    "actors/adapters/layouts.py::_pop": (1, OUTCOME),
    "actors/adapters/layouts.py::_pop_modules": (1, OUTCOME),
    "actors/adapters/layouts.py::_read_experts": (2, OUTCOME),
    "actors/adapters/tensors.py::read_tensors": (1, OUTCOME),
    "actors/adapters/tensors.py::tensor_names": (1, EXPORT),
    "actors/export/base_files.py::_read": (1, EXPORT),
    "actors/export/base_files.py::_files_by_name": (1, EXPORT),
    "actors/export/base_files.py::_json": (1, EXPORT),
    "actors/export/folders.py::merge_adapter": (1, EXPORT),
    "actors/export/merging.py::added_to": (1, EXPORT),
    "actors/images/eyes.py::open": (2, IMAGES),
    "actors/images/layout.py::count_images": (1, IMAGES),
    "actors/images/pictures.py::open_picture": (2, IMAGES),
    "actors/arrivals.py::_told": (2, NO_COMMAND),
    "actors/images/pictures.py::pixels_of": (1, IMAGES),
    "actors/model/memory.py::told_as_ours": (1, OUTCOME),
    "actors/model/attention.py::attend_packed": (1, AT_START),
    "actors/model/attention.py::_refuse_unknown": (3, AT_START),
    "actors/model/attention.py::_window_of_mask": (1, AT_START),
    "actors/model/loading.py::load_model": (2, AT_START),
    "actors/model/loading.py::_expand": (2, AT_START),
    "actors/model/loading.py::_in_4_bits": (1, AT_START),
    "actors/model/nf4.py::nf4_config": (1, AT_START),
    "actors/model/loading.py::without_weights": (1, EXPORT),
    "actors/model/base_model.py::wrap_model": (2, AT_START),
    "actors/model/base_model.py::_probe": (2, AT_START),
    "actors/model/lora.py::select": (3, OUTCOME),
    "actors/model/sizing.py::described": (1, AT_START),
    "actors/model/sizing.py::_built": (1, AT_START),
    "actors/model/targets.py::find_sites": (1, AT_START),
    "actors/model/lora.py::_take_over_experts": (1, AT_START),
    "actors/sampling/compiled.py::_check": (1, AT_START),
    "actors/model/graphs.py::cannot_be_compiled": (1, AT_START),
    "actors/training/compiled_layers.py::_check": (1, AT_START),
    "actors/sampling/decoder.py::_too_long": (2, NO_COMMAND),
    "actors/sampling/narrowing.py::_failure": (2, NO_COMMAND),
    "actors/sampling/prompt_logprobs.py::score_prompt": (1, NO_COMMAND),
    "actors/sampling/sequences.py::accept": (1, NO_COMMAND),
    "actors/training/engine.py::_attempt_smaller": (1, OUTCOME),
    "actors/training/engine.py::_step": (1, OUTCOME),
    "actors/training/engine.py::_unknown": (1, OUTCOME),
    "actors/training/trainer.py::_guarded": (1, OUTCOME),
    "actors/adapters/samplers.py::write": (1, "as of save_state: tests/actors/test_worker"),
    "actors/adapters/shares.py::read_part": (1, SHARE),
    "actors/adapters/shares.py::merged": (1, SHARE),
    "actors/adapters/shares.py::_fitting": (1, SHARE),
    "actors/adapters/shares.py::_written": (1, SHARE),
    "actors/training/sharing.py::gather": (1, SHARE),
    "actors/training/trainer.py::_gather": (1, SHARE),
    "actors/worker.py::_cancel": (1, NO_COMMAND),
    "actors/worker.py::_fetch_adapters": (1, NO_COMMAND),
    "actors/worker.py::_step": (2, NO_COMMAND),
}
"""Refusals of which no mistake of a run's command is made here: how many in each function, and why."""

ERRORS = {
    name
    for module in (lorry.wire.errors, lorry.gateway.errors)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, LorryError)
}


class Refusals(ast.NodeVisitor):
    """Counts where errors of ours are made, by the outermost function of each."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._functions: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions.append(node.name)
        self.generic_visit(node)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> None:
        made = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "of" else node.func
        if isinstance(made, ast.Name) and made.id in ERRORS:
            self.found[self._functions[0]] += 1
        self.generic_visit(node)


def refusals() -> Iterator[tuple[str, int]]:
    for package in ("wire", "storage", "client", "scheduler", "gateway", "actors"):
        for file in sorted((ROOT / package).rglob("*.py")):
            visitor = Refusals()
            visitor.visit(ast.parse(file.read_text()))
            for function, count in visitor.found.items():
                yield f"{file.relative_to(ROOT)}::{function}", count


def test_every_refusal_that_the_code_can_make_is_made_here_or_has_a_reason_not_to_be() -> None:
    known = Counter({where: count for where, (count, _) in ELSEWHERE.items()})
    made: dict[str, set[str]] = {}
    for mistake in MISTAKES:
        made.setdefault(mistake.where, set()).add(mistake.says)
    there = dict(refusals())
    assert {where: count for where, count in there.items() if known[where] + len(made.get(where, ())) < count} == {}
    assert (known.keys() | made.keys()) - there.keys() == set(), "these functions refuse nothing any more"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.where.rpartition('::')[2]}-{mistake.says}")
def test_after_any_refusal_the_same_run_goes_on(tenant: Tenant, mistake: Mistake) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        assert mistake.says in mistake.make(run)
        assert run.goes_on()


def test_a_refused_command_costs_nothing_and_is_told_like_any_that_failed(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        run.post("save_weights", path="epoch/1")
        assert tenant.lorry("usage").count(run.id) == 0
    lines = [line for line in tenant.lorry("status").splitlines() if run.id in line]
    assert any("save_state" in line and "InvalidRequestError" in line for line in lines), lines


def test_a_mistake_that_is_sent_again_is_the_same_failure(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        body = {"model_id": run.id, "seq_id": run.next(), "path": "epoch/1"}
        assert run.failure("save_weights", json=body) == run.failure("save_weights", json=body)
        answer = http.post("save_weights", json=body | {"path": "epoch-1"})
        assert answer.status_code == 400 and "under its seq" not in answer.text
        assert "number names one request" in answer.json()["detail"]
        assert run.goes_on()


async def test_a_bug_in_the_gateway_costs_its_request_alone(tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(body: object) -> None:
        raise ZeroDivisionError("a bug")

    config = GatewayConfig(tenant.server.address, port=0)
    with tenant.http() as plain:
        run = Run(tenant, plain)
        async with (
            running(config) as url,
            httpx.AsyncClient(base_url=f"{url}/api/v1", headers={"X-API-Key": tenant.key}, timeout=600) as http,
        ):
            monkeypatch.setattr("lorry.gateway.tinker.training._adam_params", bug)
            body = {"model_id": run.id, "seq_id": run.next(), "optim_params": ADAM}
            request = (await http.post("optim_step", json=body)).json()["request_id"]
            failed = (await http.post("retrieve_future", json={"request_id": request})).json()
            assert failed["category"] == "server" and "ZeroDivisionError" in failed["error"]
        assert run.goes_on()


async def test_a_connection_that_is_lost_in_mid_body_leaves_the_seq_to_the_same_request(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        message = run.a_pass()
        message.data[0].loss_fn_inputs["weights"].CopyFrom(tensor())
        body = message.SerializeToString()
        head = f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: x\r\nX-API-Key: {tenant.key}\r\nContent-Length: "
        url = httpx.URL(tenant.server.url)
        async with await anyio.connect_tcp(url.host, url.port or 80) as stream:
            await stream.send(f"{head}{len(body)}\r\n\r\n".encode() + body[: len(body) - 10])
        accepted = http.post("forward_backward", content=body)
        assert accepted.status_code == 200, accepted.text
        result = http.post("retrieve_future", json={"request_id": accepted.json()["request_id"]}).json()
        assert "metrics" in result
        assert run.goes_on()


async def test_a_conflict_disturbs_nobody_who_waits_for_the_other_request(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        first, second = run.a_pass(), run.a_pass()
        request = http.post("forward_backward", content=second.SerializeToString()).json()["request_id"]
        results: list[httpx.Response] = []

        async def wait() -> None:
            async with httpx.AsyncClient(base_url=http.base_url, headers=http.headers, timeout=None) as patient:
                results.append(await patient.post("retrieve_future", json={"request_id": request}))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            other = run.a_pass("focal")
            other.seq_id = second.seq_id
            assert http.post("forward_backward", content=other.SerializeToString()).status_code == 400
            await anyio.to_thread.run_sync(
                lambda: http.post("forward_backward", content=first.SerializeToString()).raise_for_status()
            )
        assert "metrics" in results[0].json()


def test_a_part_that_failed_says_which_it_was_and_what_stands(tenant: Tenant) -> None:
    with tenant.http() as http:
        run = Run(tenant, http)
        run.http.post("forward_backward", content=run.a_pass().SerializeToString())
        said = run.backward(run.a_pass("focal"))
    assert f"In request {run.seq} of this run" in said
    assert "stand until the next optim_step" in said
    assert "othing was executed" not in said


def test_the_reasons_name_files_that_exist() -> None:
    for _, why in ELSEWHERE.values():
        for word in why.replace(":", " ").replace(",", " ").split():
            if word.startswith("tests/"):
                assert (ROOT / word).exists() or Path(ROOT / f"{word}.py").exists(), word
