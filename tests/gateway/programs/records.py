"""Scripts that look up and change what is kept, and that make mistakes."""

from collections.abc import Callable
from typing import Any

import tinker
from tinker import types

from .shared import MODEL, example, new_run, ready, steps, tokens_of


def checkpoints() -> dict[str, Any]:
    service, rest = tinker.ServiceClient(), tinker.RestClient()
    training = new_run(service)
    steps(training, [example(tokens_of(training))], 1)
    saved = training.save_state("kept", user_metadata={"note": "a"}).result().path
    sampled = training.save_weights_for_sampler("out", ttl_seconds=3600).result().path
    external = training.save_weights_external("take").result().path
    training.save_weights_and_get_sampling_client().result()
    urls = rest.get_external_weights_urls(external).result()
    rest.set_checkpoint_ttl_from_tinker_path(saved, 7200).result()
    rest.publish_checkpoint_from_tinker_path(sampled).result()
    listed = rest.list_checkpoints(training.model_id).result().checkpoints
    copied = rest.copy_weights(sampled, "default").result()
    info = rest.get_weights_info_by_tinker_path(saved).result()
    run = rest.get_training_run(training.model_id).result()
    same_run = rest.get_training_run_by_tinker_path(saved).result()
    rest.delete_checkpoint_from_tinker_path(external).result()
    archived = tinker.ServiceClient(project_id="default").copy_weights(saved).result()
    run_of_copy, _, copy_id = archived.removeprefix("tinker://").partition("/")
    rest.delete_checkpoint(run_of_copy, copy_id).result()
    audit = tinker.AdminClient().get_audit_log("checkpoints").result().entries
    return {
        "audit": [[entry.event, entry.tinker_path] for entry in audit],
        "same_run": same_run.training_run_id,
        "archived": archived,
        "model_id": training.model_id,
        "saved": saved,
        "sampled": sampled,
        "copied": copied,
        "urls": urls.urls,
        "listed": {c.tinker_path: [c.checkpoint_type, c.public, c.expires_at is not None] for c in listed},
        "metadata": [c.user_metadata for c in listed if c.tinker_path == saved],
        "left": [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints],
        "rank": info.lora_rank,
        "last": [run.last_checkpoint.tinker_path, run.last_sampler_checkpoint.tinker_path],
        "storage": tinker.AdminClient().get_current_checkpoint_storage_usage().result().data[0].checkpoint_count,
    }


def sessions() -> dict[str, Any]:
    rest = tinker.RestClient()
    with tinker.ServiceClient(user_metadata={"project": "x"}, display_name="Night run") as service:
        training = new_run(service)
        steps(training, [example(tokens_of(training))], 1)
        session = service.holder.get_session_id()
        found = rest.get_session(session).result()
        active = rest.search_sessions(types.SessionSearchRequest(display_name="night")).result().sessions
    over = rest.search_sessions(types.SessionSearchRequest(session_id=session)).result().sessions
    return {
        "runs": found.training_run_ids,
        "model_id": training.model_id,
        "metadata": found.user_metadata,
        "session": session,
        "listed": rest.list_sessions().result().sessions,
        "active": [[s.session_id, s.status.type if s.status else None] for s in active],
        "over": [s.status.reason.type for s in over],
        "whoami": rest.whoami().result().user_urn,
    }


def projects() -> dict[str, Any]:
    """A program's session is put into a project when it starts, moved, and found there; what it used stays."""
    rest = tinker.RestClient()
    with tinker.ServiceClient(project_id="birds") as service:
        training = new_run(service, user_metadata={"arm": "a"})
        steps(training, [example(tokens_of(training))], 1)
        saved = training.save_state("kept").result().path
        session = service.holder.get_session_id()
        new_run(service, user_metadata={"arm": "b"})
        born_in = [
            s.project_id for s in rest.search_sessions(types.SessionSearchRequest(session_id=session)).result().sessions
        ]
        rest.assign_session_project(session, "owls").result()
        steps(training, [example(tokens_of(training))], 1)
    copied = rest.copy_weights(saved, "nests").result()
    mistakes: dict[str, str] = {}
    tries: dict[str, Callable[[], Any]] = {
        "name": lambda: rest.assign_session_project(session, "../x").result(),
        "session": lambda: rest.assign_session_project("session-0", "owls").result(),
        "search": lambda: rest.search_sessions(types.SessionSearchRequest(project_ids=["eagles"])).result(),
        "runs": lambda: rest.list_training_runs(project_id="eagles").result(),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except tinker.APIStatusError as error:
            mistakes[name] = f"{error.status_code}: {error}"
    found = rest.search_sessions(types.SessionSearchRequest(project_ids=["owls"])).result().sessions
    storage = tinker.AdminClient().get_current_checkpoint_storage_usage().result().data
    return {
        "born_in": born_in,
        "found": [s.session_id for s in found],
        "session": session,
        "runs": [r.training_run_id for r in rest.list_training_runs(project_id="owls").result().training_runs],
        "birds": [r.training_run_id for r in rest.list_training_runs(project_id="birds").result().training_runs],
        "model_id": training.model_id,
        "used": sorted(e.project_id for e in billed_lately().data if e.event_info.type == "training"),
        "stored": sorted(item.project_id for item in storage),
        "copied": copied.removeprefix("tinker://").partition("/")[0],
        "nests": [r.training_run_id for r in rest.list_training_runs(project_id="nests").result().training_runs],
        "mistakes": mistakes,
    }


def storage() -> dict[str, Any]:
    """What is kept is billed by the hour, and goes many at once."""
    training = new_run(tinker.ServiceClient())
    for name in "abc":
        training.save_state(name).result()
    usage = tinker.AdminClient().get_current_checkpoint_storage_usage().result()
    kept = [e for e in billed_lately().data if e.event_info.type == "storage"]
    return {
        "rate": usage.effective_rate_usd_per_gigabyte_month,
        "bytes": sum(item.size_bytes for item in usage.data),
        "monthly": sum(item.estimated_monthly_cost_usd for item in usage.data),
        "gigabyte_hours": sum(e.event_info.gigabyte_hours for e in kept),
        "free": [e.event_info.free for e in kept],
        "cost": sum(e.estimated_cost_usd for e in kept),
        "model_id": training.model_id,
    }


def in_time() -> dict[str, Any]:
    """A timeout for all that a client asks for: what is in time is as ever, and a long sample is ended."""
    usual = tinker.ServiceClient(default_headers_overrides={"X-Lorry-Timeout-S": "600"})
    training = new_run(usual)
    losses = steps(training, [example(tokens_of(training))], 2)
    hasty = tinker.ServiceClient(default_headers_overrides={"X-Lorry-Timeout-S": "0.2"})
    sampler = ready(hasty.create_sampling_client(base_model=MODEL))
    prompt, params = types.ModelInput.from_ints([5]), types.SamplingParams(max_tokens=4000, stop=[])
    try:
        sampler.sample(prompt, 4, params).result()
    except tinker.RequestFailedError as error:
        return {"losses": losses, "said": str(error)}
    raise AssertionError("was in time")


def billed_lately() -> Any:
    from datetime import UTC, datetime, timedelta

    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return tinker.AdminClient().get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).result()


def billing() -> dict[str, Any]:
    training = new_run(tinker.ServiceClient(user_metadata={"grant": "x"}))
    tokens = tokens_of(training)
    steps(training, [example(tokens)], 1)
    usage = billed_lately()
    return {
        "events": [[e.event_info.type, e.event_info.token_count] for e in usage.data],
        "rates": [e.effective_rate_usd_per_million_tokens for e in usage.data],
        "costs": [e.estimated_cost_usd for e in usage.data],
        "sessions": {name: session.user_metadata for name, session in usage.sessions.items()},
        "session": training.model_id.partition(":")[0],
        "tokens": len(tokens) - 1,
    }


def cached_prompts() -> dict[str, Any]:
    """The second of two equal prompts, longer than a block of the cache, is found computed but for its end."""
    training = new_run(tinker.ServiceClient())
    sampler = training.save_weights_and_get_sampling_client()
    prompt, params = types.ModelInput.from_ints(list(range(5, 45))), types.SamplingParams(max_tokens=1, stop=[])
    for _ in range(2):
        sampler.sample(prompt, 1, params).result()
    prefill = [e.event_info for e in billed_lately().data if e.event_info.type == "sampling_prefill"]
    return {"prefill": sorted([e.cached, e.token_count] for e in prefill)}


def mistakes() -> dict[str, Any]:
    """What each mistake raises."""
    service = tinker.ServiceClient()
    training = new_run(service)
    tokens = tokens_of(training)
    wrong_token = example([*tokens[:-1], 10**6])
    image = types.Datum(
        model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)]),
        loss_fn_inputs={"target_tokens": types.TensorData(data=[1], dtype="int64")},
    )
    attempts: dict[str, Callable[[], Any]] = {
        "unknown_model": lambda: service.create_lora_training_client(base_model="nobody/knows").result(),
        "rank_too_large": lambda: service.create_lora_training_client(base_model=MODEL, rank=10**6).result(),
        "dimuon": lambda: service.create_lora_training_client(
            base_model=MODEL, optimizer=types.DimuonOptimizerConfig()
        ).result(),
        "token_out_of_range": lambda: training.forward_backward([wrong_token], "cross_entropy").result(),
        "no_such_checkpoint": lambda: service.create_sampling_client(
            model_path="tinker://nobody/sampler_weights/x"
        ).result(),
        "foreign_run": lambda: tinker.RestClient().get_training_run("somebody-else").result(),
        "image": lambda: new_run(service).forward([image], "cross_entropy").result(),
    }
    raised: dict[str, Any] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            raised[name] = [type(error).__name__, getattr(error, "status_code", None), str(error)[:300]]
    return raised


def foreign(path: str, run: str, session: str) -> dict[str, Any]:
    """What another tenant gets of somebody's things."""
    rest, service = tinker.RestClient(), tinker.ServiceClient()
    attempts: dict[str, Callable[[], Any]] = {
        "run": lambda: rest.get_training_run(run).result(),
        "checkpoints": lambda: rest.list_checkpoints(run).result(),
        "session": lambda: rest.get_session(session).result(),
        "delete": lambda: rest.delete_checkpoint_from_tinker_path(path).result(),
        "load": lambda: service.create_training_client_from_state(path).result(),
    }
    seen: dict[str, Any] = {"listed": [r.training_run_id for r in rest.list_training_runs().result().training_runs]}
    for name, attempt in attempts.items():
        try:
            attempt()
            seen[name] = None
        except tinker.APIStatusError as error:
            seen[name] = error.status_code
    return seen


def may_not_train() -> dict[str, Any]:
    """With a key that may sample, and not train."""
    service = tinker.ServiceClient()
    try:
        new_run(service)
    except tinker.APIStatusError as error:
        refused = error
    else:
        raise AssertionError("it may train")
    sampling = ready(service.create_sampling_client(base_model=MODEL))
    params = types.SamplingParams(max_tokens=4, stop=[])
    response = sampling.sample(types.ModelInput.from_ints([1, 2]), 1, params).result()
    return {
        "kind": type(refused).__name__,
        "says": str(refused),
        "sampled": len(response.sequences[0].tokens),
    }


def within_limits() -> dict[str, Any]:
    """Whose rank, pace, queue and samples are limited: it takes longer, and all of it is done."""
    service = tinker.ServiceClient()
    try:
        new_run(service, rank=16)
    except tinker.APIStatusError as error:
        refused = str(error)
    else:
        raise AssertionError("the rank is not limited")
    training = new_run(service, rank=4)
    data = [example(tokens_of(training))]
    losses = steps(training, data, 8)
    backlog = [training.forward_backward(data, "cross_entropy") for _ in range(8)]
    for future in backlog:
        future.result()
    sampling = ready(service.create_sampling_client(base_model=MODEL))
    params = types.SamplingParams(max_tokens=4, stop=[])
    prompt = types.ModelInput.from_ints([1, 2])
    samples = [sampling.sample(prompt, 2, params) for _ in range(4)]
    return {
        "refused": refused,
        "steps": len(losses),
        "sequences": sum(len(sample.result().sequences) for sample in samples),
        "too_many": refusal(lambda: sampling.sample(prompt, 3, params).result()),
    }


def beyond_limits() -> dict[str, Any]:
    """Who may store nothing: a save fails, and the run goes on."""
    training = new_run(tinker.ServiceClient())
    data = [example(tokens_of(training))]
    steps(training, data, 1)
    return {"saved": refusal(lambda: training.save_state("a").result()), "steps": len(steps(training, data, 2))}


def without_money() -> dict[str, Any]:
    """Who may have one run, of small rank in its project, and has spent what it may."""
    service = tinker.ServiceClient(project_id="thrift")
    rank = refusal(lambda: new_run(service, rank=8))
    training = new_run(service, rank=4)
    tokens = tokens_of(training)
    return {
        "rank": rank,
        "runs": refusal(lambda: new_run(service, rank=4)),
        "spent": refusal(lambda: training.forward_backward([example(tokens)], "cross_entropy").result()),
        "again": refusal(lambda: training.optim_step(types.AdamParams()).result()),
    }


def refusal(ask: Callable[[], object]) -> str:
    try:
        ask()
    except tinker.TinkerError as error:
        return str(error)
    raise AssertionError("it was not refused")


def borrowed(path: str, *tokens: str) -> dict[str, Any]:
    """Another tenant's checkpoint: with wrong tokens, with the owner's, and a copy of it. What each wrong one says."""
    service, said = tinker.ServiceClient(), list[str]()
    training = new_run(service)
    for token in tokens[:-1]:
        try:
            training.load_state(path, weights_access_token=token).result()
        except tinker.TinkerError as error:
            said.append(str(error))
    loaded = training.load_state(path, weights_access_token=tokens[-1]).result().path
    made = ready(service.create_training_client_from_state(path, weights_access_token=tokens[-1]))
    rest = service.create_rest_client()
    copied = rest.copy_weights(path, "default", weights_access_token=tokens[-1]).result()
    losses = [steps(client, [example(tokens_of(client))], 1)[0] for client in (training, made)]
    return {"said": said, "loaded": loaded, "copied": copied, "losses": losses}
