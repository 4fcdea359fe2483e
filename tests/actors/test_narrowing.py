"""Memory that runs out, or a bug, in a step of many: it ends the one request that cannot be computed alone, and of the
others nobody can tell that anything happened."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from lorry.actors.model.base_model import BaseModel
from lorry.actors.sampling import drawn
from lorry.actors.sampling.decoder import Decoder
from lorry.actors.sampling.kv_cache import KVCache
from lorry.actors.sampling.narrowing import in_parts
from lorry.actors.sampling.sequences import Row
from lorry.wire.errors import InternalError, OutOfMemoryError
from lorry.wire.model_input import ModelInput

from .test_decoder import PROMPTS, WANTED, alone, new_decoder, request, run, sample, tokens_of, with_adapters
from .test_decoder_cache import LONG
from .test_lineup import new_request

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@contextmanager
def failing(owner: Any, name: str, error: Exception, if_: Callable[..., bool]) -> Any:
    """Inside, calls of the function raise if their arguments are so. Yields the list of those that did."""
    original, raised = getattr(owner, name), list[Any]()

    def scarce(*args: Any, **options: Any) -> Any:
        if if_(*args):
            raised.append(args)
            raise error
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, scarce)
        yield raised


def more_tokens_than(limit: int) -> Callable[..., bool]:
    return lambda _base, tokens, *_: len(tokens) > limit


def all_free(decoder: Decoder) -> bool:
    return decoder.pool.free == decoder.pool.blocks


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 6),
    draws=st.integers(1, 4),
    copies=st.integers(1, 3),
    rows=st.integers(1, 9),
    blocks=st.integers(4, 20),
    error=st.sampled_from(SHORT),
)
def test_where_memory_is_for_a_few_tokens_at_a_time_all_requests_get_theirs(
    tokens: int, heads: int, draws: int, copies: int, rows: int, blocks: int, error: Exception
) -> None:
    base, adapters = with_adapters()
    expected = alone()
    with (
        failing(BaseModel, "hidden_states", error, more_tokens_than(tokens)),
        failing(BaseModel, "logits", error, lambda _, hidden: len(hidden) > heads),
        failing(drawn, "sample", error, lambda logits, *_: len(logits) > draws),
        failing(KVCache, "copy", error, lambda _, pairs: len(pairs) > copies),
    ):
        decoder = new_decoder(base, rows, 64, blocks)
        for i, wanted in enumerate(WANTED):
            decoder.add(i, wanted, adapters[i % 4], i, owner=str(i % 4))
        results = run(decoder)
    assert [tokens_of(results[i]) for i in range(len(WANTED))] == expected
    assert all_free(decoder)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (SHORT[0], OutOfMemoryError, "does not fit into the actor's memory"),
        (KeyError("bug"), InternalError, "KeyError"),
    ],
    ids=["memory", "a bug"],
)
def test_a_row_that_cannot_be_computed_ends_its_own_request_alone(error: Exception, kind: Any, told: str) -> None:
    base, adapters = with_adapters()
    ill = request(LONG[:50], 1, max_tokens=10, seed=1)
    third = tokens_of(sample(base, ill, adapters[2]))[0][2]

    def has_it(_: Any, tokens: torch.Tensor, positions: torch.Tensor, **__: Any) -> bool:
        return bool(((tokens == third) & (positions == 52)).any())

    decoder = new_decoder(base, 16, 64)
    with failing(BaseModel, "hidden_states", error, has_it) as raised, capture_logs():
        decoder.add("before", request(PROMPTS[1], 3), adapters[1], 1)
        decoder.add("ill", ill, adapters[2], 0)
        decoder.add("after", request(PROMPTS[2], 4), adapters[2], 3)
        results = run(decoder)
    assert isinstance(results["ill"], kind)
    assert "after 53 tokens" in str(results["ill"])
    assert told in str(results["ill"])
    assert len(raised) <= 5, "eight rows are halved, not tried one by one"
    assert tokens_of(results["before"]) == tokens_of(sample(base, request(PROMPTS[1], 3), adapters[1], seed=1))
    assert tokens_of(results["after"]) == tokens_of(sample(base, request(PROMPTS[2], 4), adapters[2], seed=3))
    assert all_free(decoder)


@pytest.mark.parametrize("scored", [False, True])
def test_a_prompt_that_cannot_be_computed_ends_its_own_request_and_the_others_chunks_go_on(scored: bool) -> None:
    base, adapters = with_adapters()
    marked = [*LONG[:40], 96, *LONG[40:]]

    def is_marked(_: Any, tokens: torch.Tensor, positions: torch.Tensor, **__: Any) -> bool:
        return bool(((tokens == 96) & (positions == 40)).any())

    decoder = new_decoder(base, 8, 100)
    with failing(BaseModel, "hidden_states", SHORT[0], is_marked):
        decoder.add("row", request(PROMPTS[1], 2, max_tokens=20), adapters[1], 1)
        decoder.step()
        if scored:
            decoder.add_prompt("ill", ModelInput.from_ints(marked), adapters[2])
        else:
            decoder.add("ill", request(marked, 5), adapters[2], 0)
        decoder.add("long", request(LONG, 2, include_prompt_logprobs=True), adapters[3], 4)
        results = run(decoder)
    assert isinstance(results["ill"], OutOfMemoryError)
    assert "token 41 of a sequence of 71 does not fit" in str(results["ill"])
    row, long = request(PROMPTS[1], 2, max_tokens=20), request(LONG, 2, include_prompt_logprobs=True)
    assert tokens_of(results["row"]) == tokens_of(sample(base, row, adapters[1], seed=1))
    undisturbed = sample(base, long, adapters[3], seed=4)
    assert tokens_of(results["long"]) == tokens_of(undisturbed)
    assert results["long"].prompt_logprobs == pytest.approx(undisturbed.prompt_logprobs, abs=1e-4)
    assert all_free(decoder)


def test_prompt_scores_that_are_broken_off_go_on_where_they_were() -> None:
    base, adapters = with_adapters()
    wanted = request(LONG, topk_prompt_logprobs=3, prompt_alt_tokens_k=2, include_prompt_logprobs=True, seed=1)
    undisturbed = sample(base, wanted, adapters[1])
    calls: list[int] = []

    def every_other(logits: torch.Tensor, *_: Any) -> bool:
        calls.append(len(logits))
        return len(logits) > 1 and len(calls) % 2 == 0

    with (
        pytest.MonkeyPatch.context() as patch,
        failing(torch.Tensor, "log_softmax", SHORT[2], every_other) as raised,
    ):
        patch.setattr("lorry.actors.sampling.prompt_logprobs.LOGITS_PER_CHUNK", 97 * 10)
        found = sample(base, wanted, adapters[1])
    assert raised
    assert found.prompt_logprobs == pytest.approx(undisturbed.prompt_logprobs, abs=1e-4)
    assert found.topk_prompt_logprobs is not None and undisturbed.topk_prompt_logprobs is not None
    assert [row and [token for token, _ in row] for row in found.topk_prompt_logprobs] == [
        row and [token for token, _ in row] for row in undisturbed.topk_prompt_logprobs
    ]
    assert found.prompt_alt_tokens is not None and undisturbed.prompt_alt_tokens is not None
    assert (found.prompt_alt_tokens.tokens.to_numpy() == undisturbed.prompt_alt_tokens.tokens.to_numpy()).all()
    assert tokens_of(found) == tokens_of(undisturbed)


def test_an_accelerator_in_an_error_state_is_nobodys_fault() -> None:
    base, _ = with_adapters()
    decoder = new_decoder(base)
    decoder.add("one", request(PROMPTS[0]), None, 0)
    with (
        failing(BaseModel, "hidden_states", torch.AcceleratorError("illegal access"), lambda *_: True),
        pytest.raises(torch.AcceleratorError),
    ):
        decoder.step()


@given(ill=st.sets(st.integers(0, 30)), rows=st.integers(0, 30), samples=st.integers(1, 3), most=st.integers(1, 30))
def test_every_piece_goes_through_once_and_in_order_but_those_of_requests_that_cannot(
    ill: set[int], rows: int, samples: int, most: int
) -> None:
    requests = [new_request(i, 3, samples, 5) for i in range(-(-rows // samples))]
    pieces = [Row(requests[i // samples], i % samples, 0) for i in range(rows)]

    def attempt(some: Any) -> list[int]:
        places = [pieces.index(piece) for piece in some]
        if len(some) > most:
            raise SHORT[0]
        if ill.intersection(places):
            raise ValueError("a bug")
        return places

    with capture_logs():
        through = [place for _, places in in_parts(pieces, attempt) for place in places]
    failed = {i // samples for i in ill if i < rows}
    assert {request.arrival for request in requests if request.error is not None} == failed
    assert through == sorted(set(through))
    assert set(through) >= {i for i in range(rows) if i // samples not in failed}
    assert not ill.intersection(through)


@pytest.mark.parametrize("starved", [1, 3])
def test_what_finds_no_memory_while_others_hold_some_goes_on_when_they_gave_it_back(starved: int) -> None:
    """Both a prompt and a row under way, for as many steps as that takes; nothing ends, and no token changes."""
    base = with_adapters()[0]
    decoder = new_decoder(base)
    decoder.add("one", request(PROMPTS[0]), None, 0)
    for _ in range(starved):
        decoder.step()
    decoder.add("two", request(PROMPTS[1]), None, 0)
    with capture_logs(), failing(BaseModel, "hidden_states", SHORT[0], lambda *_: True):
        for _ in range(3):
            assert decoder.step(others_hold_memory=True) == [] and decoder.postponed
    found = run(decoder)
    assert not decoder.postponed and all_free(decoder)
    for key, prompt in (("one", PROMPTS[0]), ("two", PROMPTS[1])):
        assert tokens_of(found[key]) == tokens_of(sample(base, request(prompt), None))
