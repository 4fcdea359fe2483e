"""Scripts that sample."""

import pickle
from typing import Any

import tinker
from tinker import types

from .shared import MODEL, example, new_run, ready, steps, tokens_of


def every_parameter() -> dict[str, Any]:
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
    tokenizer = training.get_tokenizer()
    word = tokenizer.decode(greedy.tokens[2:4])
    return {
        "greedy": greedy.tokens,
        "word": word,
        "stopped_by_word": tokenizer.decode(one(max_tokens=6, temperature=0.0, stop=word).tokens),
        "stopped_by_words": tokenizer.decode(one(max_tokens=6, temperature=0.0, stop=["#never#", word]).tokens),
        "unstopped": [len(one(max_tokens=6, seed=seed, stop=[]).tokens) for seed in range(4)],
        "stopped": one(max_tokens=6, temperature=0.0, stop=[greedy.tokens[2]]).tokens,
        "stop_reason": one(max_tokens=6, temperature=0.0, stop=[greedy.tokens[2]]).stop_reason,
        "seeded": seeded,
        "prompt_logprobs": full.prompt_logprobs,
        "trained_logprobs": output.loss_fn_outputs[0]["logprobs"].tolist(),
        "topk_prompt": [None if row is None else len(row) for row in full.topk_prompt_logprobs or []],
        "topk_sample": [len(row or []) for row in full.sequences[0].topk_logprobs or []],
        "last_two": sampler.compute_logprobs(types.ModelInput.from_ints(tokens), prompt_logprobs_last_n=2).result(),
    }


def other_tokens() -> dict[str, Any]:
    """Logprobs of tokens that do not stand in the prompt, and draws of others in their places."""
    import numpy as np

    service = tinker.ServiceClient()
    sampler = ready(service.create_sampling_client(base_model=MODEL))
    tokens = [5, 6, 7, 8, 9, 10, 11]
    own, rows = tokens[1:], len(tokens) - 1

    def one(**options: Any) -> types.SampleResponse:
        params = types.SamplingParams(max_tokens=1, seed=3)
        return sampler.sample(types.ModelInput.from_ints(tokens), 1, params, **options).result()

    def refusal(**options: Any) -> str:
        try:
            one(**options)
        except tinker.APIStatusError as error:
            return str(error)
        return "no refusal"

    def dense(ids: Any) -> types.TensorData:
        return types.TensorData.from_numpy(np.asarray(ids, dtype=np.int64))

    listed = types.TensorData(
        data=[own[1], own[3]],
        dtype="int64",
        shape=[rows, 3],
        sparse_crow_indices=[0, 0, 1, 1, 2, *[2] * (rows - 4)],
        sparse_col_indices=[2, 0],
    )
    first = one(
        include_prompt_logprobs=True, target_prompt_logprobs=dense([[t, -1] for t in own]), prompt_alt_tokens_k=3
    )
    sparse = one(target_prompt_logprobs=listed).target_prompt_logprobs
    drawn, again = first.prompt_alt_tokens, one(prompt_alt_tokens_k=3).prompt_alt_tokens
    scored = one(target_prompt_logprobs=drawn.tokens).target_prompt_logprobs
    return {
        "prompt_logprobs": first.prompt_logprobs,
        "dense": first.target_prompt_logprobs.to_numpy().tolist(),
        "sparse_values": list(sparse.data),
        "sparse_rows": list(sparse.sparse_crow_indices),
        "sparse_columns": list(sparse.sparse_col_indices),
        "alternatives": list(drawn.tokens.shape),
        "alternatives_again": list(drawn.tokens.data) == list(again.tokens.data),
        "alternative_scores": list(scored.data),
        "alternative_logprobs": list(drawn.logprobs.data),
        "too_many": refusal(prompt_alt_tokens_k=65),
        "wrong_rows": refusal(target_prompt_logprobs=dense([[1]] * (rows + 1))),
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


def twins() -> dict[str, Any]:
    """A sampler of saved weights, reached in every way that there is."""
    service = tinker.ServiceClient()
    training = new_run(service)
    steps(training, [example(tokens_of(training))], 1)
    path = training.save_weights_for_sampler("here").result().path
    made = training.create_sampling_client(path).result()
    twin = tinker.SamplingClient.from_sampler_handle(made.get_sampler_handle())
    direct = tinker.SamplingClient.create(service.holder, model_path=path).result()
    prompt = types.ModelInput.from_ints([5, 6, 7])
    params = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
    samples = [client.sample(prompt, 1, params).result().sequences[0] for client in (made, twin, direct)]
    sampler_id = samples[0].sequence_id.rpartition(":")[0].rpartition(":")[0]
    found = tinker.RestClient().get_sampler(sampler_id).result()
    return {
        "tokens": [sample.tokens for sample in samples],
        "base_models": [client.get_base_model() for client in (made, twin, direct)],
        "path": path,
        "found": [found.sampler_id, found.base_model, found.model_path],
        "sampler_id": sampler_id,
    }
