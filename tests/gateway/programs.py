"""What users' scripts do, with nothing but the official SDK. Each runs in a process of its own and prints what it saw.

`python -m tests.gateway.programs NAME [ARGUMENT...]`, with TINKER_BASE_URL and TINKER_API_KEY set.
"""

import json
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import tinker
import torch
from tinker import types

MODEL = "jargon-1m"
SENTENCE = "The carrier signs the bill of lading when the cargo is on board."


def ready(client: Any) -> Any:
    """Since 0.36 the SDK answers with a future of the client, before with the client."""
    return client.result() if hasattr(client, "result") else client


def tokens_of(training: Any, text: str = SENTENCE) -> list[int]:
    return training.get_tokenizer().encode(text)


def example(tokens: list[int]) -> types.Datum:
    weights = types.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32")
    targets = types.TensorData(data=tokens[1:], dtype="int64")
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )


def new_run(service: tinker.ServiceClient, rank: int = 4) -> Any:
    return ready(service.create_lora_training_client(base_model=MODEL, rank=rank, seed=7))


def steps(training: Any, data: list[types.Datum], count: int) -> list[float]:
    losses: list[float] = []
    for _ in range(count):
        passed = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=5e-3))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses


def supervised() -> dict[str, Any]:
    service = tinker.ServiceClient()
    training = new_run(service)
    data = [example(tokens_of(training))]
    output = training.forward(data, "cross_entropy").result()
    losses = steps(training, data, 5)
    return {
        "model_id": training.model_id,
        "losses": losses,
        "first": output.metrics["loss:sum"],
        "sum_of_logprobs": sum(output.loss_fn_outputs[0]["logprobs"].tolist()),
        "tokens": len(tokens_of(training)),
        "outputs": len(output.loss_fn_outputs[0]["logprobs"].tolist()),
        "models": [model.model_name for model in service.get_server_capabilities().supported_models],
    }


def chunked() -> dict[str, Any]:
    """More datums than one request may have: the SDK sends several at once, the first of them last."""
    training = new_run(tinker.ServiceClient())
    tokens = tokens_of(training)
    data = [example(tokens[: 3 + i % 3]) for i in range(1100)]
    output = training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams()).result()
    return {"shapes": [len(o["logprobs"].tolist()) for o in output.loss_fn_outputs], "metrics": output.metrics}


def wide_targets() -> dict[str, Any]:
    """cross_entropy over [N, K] targets, dense and sparse, is the sum over the K."""
    training = new_run(tinker.ServiceClient())
    tokens = tokens_of(training)
    n = len(tokens) - 1
    ids = torch.tensor([[t, 5, 0, 0, 0, 0] for t in tokens[1:]])
    weights = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * n)
    prompt = types.ModelInput.from_ints(tokens[:-1])
    losses = {}
    for name, make in (("dense", types.TensorData.from_torch), ("sparse", types.TensorData.from_torch_sparse)):
        inputs = {"target_tokens": make(ids), "weights": make(weights)}
        datum = types.Datum(model_input=prompt, loss_fn_inputs=inputs)
        losses[name] = training.forward([datum], "cross_entropy").result().metrics["loss:sum"]
    losses["narrow"] = training.forward([example(tokens)], "cross_entropy").result().metrics["loss:sum"]
    return losses


def reinforcement() -> dict[str, Any]:
    """Rewards odd tokens; their share among the samples grows."""
    service = tinker.ServiceClient()
    training = new_run(service)
    prompt = tokens_of(training)[:4]
    rewards: list[float] = []
    sequence_ids: set[str] = set()
    for step in range(6):
        sampler = ready(training.save_weights_and_get_sampling_client())
        params = types.SamplingParams(max_tokens=4, temperature=1.0, seed=step)
        sampled = sampler.sample(types.ModelInput.from_ints(prompt), 32, params).result()
        scores = [sum(1.0 for token in s.tokens if token % 2) / len(s.tokens) for s in sampled.sequences]
        mean = sum(scores) / len(scores)
        rewards.append(mean)
        sequence_ids |= {s.sequence_id for s in sampled.sequences}
        data = [policy_example(prompt, s, score - mean) for s, score in zip(sampled.sequences, scores, strict=True)]
        passed = training.forward_backward(data, "importance_sampling")
        stepped = training.optim_step(types.AdamParams(learning_rate=2e-2))
        passed.result()
        stepped.result()
    return {"rewards": rewards, "sequence_ids": len(sequence_ids)}


def policy_example(prompt: list[int], sequence: types.SampledSequence, advantage: float) -> types.Datum:
    tokens, before = prompt + sequence.tokens, len(prompt) - 1
    floats = {
        "logprobs": [0.0] * before + list(sequence.logprobs or []),
        "advantages": [0.0] * before + [advantage] * len(sequence.tokens),
    }
    inputs = {name: types.TensorData(data=values, dtype="float32") for name, values in floats.items()}
    inputs["target_tokens"] = types.TensorData(data=tokens[1:], dtype="int64")
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def resume() -> dict[str, Any]:
    service = tinker.ServiceClient()
    training = new_run(service)
    data = [example(tokens_of(training))]
    steps(training, data, 2)
    path = training.save_state("middle").result().path
    went_on = steps(training, data, 3)
    again = ready(service.create_training_client_from_state_with_optimizer(path))
    without = ready(service.create_training_client_from_state(path))
    return {
        "path": path,
        "went_on": went_on,
        "resumed": steps(again, data, 3),
        "without_optimizer": steps(without, data, 3),
        "model_id": again.model_id,
        "rank": again.get_info().lora_rank,
    }


def custom_loss() -> dict[str, Any]:
    service = tinker.ServiceClient()

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -sum((p.sum() for p in logprobs), torch.tensor(0.0))
        return total, {"mine": 1.0}

    norms: dict[str, float] = {}
    for name in ("custom", "built_in"):
        training = new_run(service)
        data = [example(tokens_of(training))]
        if name == "custom":
            passed = training.forward_backward_custom(data, loss).result()
        else:
            passed = training.forward_backward(data, "cross_entropy").result()
        norms[name] = training.optim_step(types.AdamParams()).result().metrics["grad_norm"]
        norms[f"{name}_mine"] = passed.metrics.get("mine", 0.0)
    return norms


def sampling() -> dict[str, Any]:
    service = tinker.ServiceClient()
    training = new_run(service)
    tokens = tokens_of(training)
    prompt = types.ModelInput.from_ints(tokens[:5])
    sampler = ready(service.create_sampling_client(base_model=MODEL))

    def one(**params: Any) -> types.SampledSequence:
        return sampler.sample(prompt, 1, types.SamplingParams(**params)).result().sequences[0]

    greedy = one(max_tokens=6, temperature=0.0, stop=[])
    seeded = [one(max_tokens=6, seed=11).tokens for _ in range(2)]
    full = sampler.sample(
        types.ModelInput.from_ints(tokens),
        2,
        types.SamplingParams(max_tokens=3, temperature=1.0, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
    ).result()
    output = training.forward([example(tokens)], "cross_entropy").result()
    return {
        "greedy": greedy.tokens,
        "stopped": one(max_tokens=6, temperature=0.0, stop=[greedy.tokens[2]]).tokens,
        "stop_reason": one(max_tokens=6, temperature=0.0, stop=[greedy.tokens[2]]).stop_reason,
        "seeded": seeded,
        "prompt_logprobs": full.prompt_logprobs,
        "trained_logprobs": output.loss_fn_outputs[0]["logprobs"].tolist(),
        "topk_prompt": [None if row is None else len(row) for row in full.topk_prompt_logprobs or []],
        "topk_sample": [len(row or []) for row in full.sequences[0].topk_logprobs or []],
        "last_two": sampler.compute_logprobs(types.ModelInput.from_ints(tokens), prompt_logprobs_last_n=2).result(),
    }


def crowd() -> dict[str, Any]:
    """64 samples at once; then another client of the same sampler, as another process would have it."""
    service = tinker.ServiceClient()
    sampler = ready(service.create_sampling_client(base_model=MODEL))
    prompt = types.ModelInput.from_ints([5, 6, 7])
    params = types.SamplingParams(max_tokens=8, stop=[])
    futures = [sampler.sample(prompt, 1, params) for _ in range(64)]
    lengths = [len(future.result().sequences[0].tokens) for future in futures]
    clone = pickle.loads(pickle.dumps(sampler))
    sequence = clone.sample(prompt, 1, params).result().sequences[0]
    return {"lengths": lengths, "clone": sequence.sequence_id}


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
    rest.delete_checkpoint_from_tinker_path(external).result()
    return {
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


def billing() -> dict[str, Any]:
    from datetime import UTC, datetime, timedelta

    training = new_run(tinker.ServiceClient())
    tokens = tokens_of(training)
    steps(training, [example(tokens)], 1)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = tinker.AdminClient().get_billing_usage(hour, hour + timedelta(hours=1)).result()
    return {"events": [[e.event_info.type, e.event_info.token_count] for e in usage.data], "tokens": len(tokens) - 1}


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
        "audit_log": lambda: tinker.AdminClient().get_audit_log().result(),
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


def long_run(count: str) -> dict[str, Any]:
    """Says when it has begun, so that somebody can pull the plug."""
    training = new_run(tinker.ServiceClient())
    data = [example(tokens_of(training))]
    losses = steps(training, data, 1)
    print("begun", flush=True)
    return {"losses": losses + steps(training, data, int(count))}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
    # The SDK's background threads do not stop at the end; seldom, one of them aborts Python's own clean-up.
    os._exit(0)
