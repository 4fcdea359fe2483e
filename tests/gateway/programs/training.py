"""Scripts that train."""

from typing import Any

import tinker
from tinker import types

from .shared import example, new_run, ready, steps, tokens_of


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
    shapes = [len(o["logprobs"].tolist()) for o in output.loss_fn_outputs]
    return {"model_id": training.model_id, "shapes": shapes, "metrics": output.metrics}


def part_refused() -> dict[str, Any]:
    """A call in two parts of which one is refused, at the gateway's door and by the actor; then right calls."""
    training = new_run(tinker.ServiceClient())
    tokens = tokens_of(training)
    good = [example(tokens[:4])] * 1024
    said: list[str] = []
    norms: list[float] = []
    for wrong in (-100, 10**6):
        bad = example(tokens[:4])
        bad.loss_fn_inputs["target_tokens"] = types.TensorData(data=[5, wrong, 5], dtype="int64", shape=[3])
        try:
            training.forward_backward([*good, bad], "cross_entropy").result()
        except tinker.TinkerError as error:
            said.append(str(error))
        training.forward_backward([example(tokens[:4])], "cross_entropy").result()
        norms.append(training.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm"])
    return {"said": said, "norms": norms}


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


def load_onto_a_run() -> dict[str, Any]:
    """A saved state is loaded onto the run that saved it, with the optimizer's and without."""
    training = new_run(tinker.ServiceClient())
    data = [example(tokens_of(training))]
    steps(training, data, 2)
    path = training.save_state("middle").result().path
    went_on = steps(training, data, 3)
    loaded = training.load_state_with_optimizer(path).result().path
    again = steps(training, data, 3)
    training.load_state(path).result()
    return {
        "path": path,
        "loaded": loaded,
        "went_on": went_on,
        "again": again,
        "without_optimizer": steps(training, data, 3),
    }


def long_run(count: str) -> dict[str, Any]:
    """Says when it has begun, so that somebody can pull the plug."""
    training = new_run(tinker.ServiceClient())
    data = [example(tokens_of(training))]
    losses = steps(training, data, 1)
    print("begun", flush=True)
    return {"losses": losses + steps(training, data, int(count))}


def from_elsewhere(to_train: str, to_sample: str, *tokens: str) -> dict[str, Any]:
    """Both of an imported adapter's checkpoints."""
    service, data = tinker.ServiceClient(), [example([int(token) for token in tokens])]

    def logprobs(training: Any) -> list[float]:
        (output,) = training.forward(data, "cross_entropy").result().loss_fn_outputs
        return output["logprobs"].tolist()

    training = ready(service.create_training_client_from_state(to_train))
    before = logprobs(training)
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=3e-3)).result()
    sampler = service.create_sampling_client(to_sample)
    prompt = types.ModelInput.from_ints([int(token) for token in tokens])
    rest = service.create_rest_client()
    return {
        "trained": before,
        "after_a_step": logprobs(training),
        "with_optimizer": logprobs(ready(service.create_training_client_from_state_with_optimizer(to_train))),
        "sampled": sampler.compute_logprobs(prompt).result()[1:],
        "listed": sorted(found.tinker_path for found in rest.list_user_checkpoints().result().checkpoints),
    }


def in_flight() -> dict[str, Any]:
    """Two sampling clients in flight, and one of fixed weights, before and after a step."""
    service = tinker.ServiceClient()
    training = new_run(service)
    prompt = types.ModelInput.from_ints(tokens_of(training))
    first = ready(training.save_weights_and_get_sampling_client(kind="inflight"))
    fixed = ready(training.save_weights_and_get_sampling_client())
    before = [client.compute_logprobs(prompt).result() for client in (first, fixed)]
    steps(training, [example(tokens_of(training))], 2)
    second = ready(training.save_weights_and_get_sampling_client(kind="inflight"))
    after = [client.compute_logprobs(prompt).result() for client in (first, fixed, second)]
    return {"before": before, "after": after}
