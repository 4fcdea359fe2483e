from collections.abc import Callable

import pytest
import torch
from transformers import Gemma2Config, Llama4TextConfig, MambaConfig, PreTrainedModel

from lorry.actors.model import attention
from lorry.actors.model.base_model import BaseModel, wrap_model
from lorry.actors.model.in_flight import Segment
from lorry.actors.model.lora import attach_lora
from lorry.actors.model.spec import AdapterSpec
from lorry.actors.training.pass_cost import meter_pass
from lorry.wire.errors import UnsupportedModelError

from .models import SHAPE, build, tiny_deepseek_v3, tiny_gpt_oss, tiny_llama, tiny_qwen3, tiny_qwen3_moe, tiny_qwen3_vl

LENGTHS = [9, 5, 5, 14, 1, 1, 1]
FAMILIES = [tiny_qwen3, tiny_llama, tiny_qwen3_moe, tiny_gpt_oss, tiny_deepseek_v3, tiny_qwen3_vl]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (length,), generator=generator) for length in LENGTHS]


def packed_hidden_states(base: BaseModel, rows: list[torch.Tensor], grad: bool = False) -> torch.Tensor:
    base.in_flight.lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return base.hidden_states(torch.cat(rows), positions, grad=grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_get_the_logits_they_get_alone(family: Callable[[], PreTrainedModel]) -> None:
    alone, base = family(), wrap_model(family())
    with torch.no_grad():
        expected = torch.cat([alone(row[None], use_cache=False).logits[0] for row in sequences()])
        logits = base.model.get_output_embeddings()(packed_hidden_states(base, sequences()))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_window_shorter_than_a_sequence_is_honoured_without_sinks() -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    alone, base = tiny_qwen3(**window), wrap_model(tiny_qwen3(**window))
    with torch.no_grad():
        expected = torch.cat([alone(row[None], use_cache=False).logits[0] for row in sequences()])
        logits = base.model.get_output_embeddings()(packed_hidden_states(base, sequences()))
        unlimited = tiny_qwen3()(sequences()[0][None], use_cache=False).logits[0]
    assert (expected[: len(unlimited)] - unlimited).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_packed_gradients_are_those_of_each_sequence_alone() -> None:
    alone, base = tiny_qwen3(), wrap_model(tiny_qwen3())
    weights = {name: p.requires_grad_() for name, p in base.model.named_parameters() if "proj" in name}
    packed_hidden_states(base, sequences(), grad=True).square().sum().backward()
    for row in sequences():
        alone.get_decoder()(row[None], use_cache=False).last_hidden_state.square().sum().backward()
    expected = dict(alone.named_parameters())
    assert weights
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("scores", [1, 2**24])
def test_attention_in_blocks_is_attention_at_once(
    sinks: bool, window: int | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are its gradients: of two rows of 100 tokens, of which blocks have 16, or all."""
    monkeypatch.setattr(attention, "SCORES_OF_A_BLOCK", scores)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 100, 8), (2, 2, 100, 8), (2, 2, 100, 6), (4,))
    query, key, value, sink = (torch.randn(shape, generator=generator) for shape in shapes)
    found: list[list[torch.Tensor]] = []
    for way in (attention.attend_in_blocks, attention.attend_block):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = way(inputs[0], inputs[1], inputs[2], 0.3, window, sink if sinks else None)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        with torch.no_grad():
            assert torch.equal(way(query, key, value, 0.3, window, sink if sinks else None), output)
        found.append([output.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_the_gradients_of_many_blocks_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that 64 blocks see, in bfloat16: about as far from float32's as those of one block."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, dy = (torch.randn(1, 2, 1024, 8, generator=generator) for _ in range(4))
    sinks, off = torch.zeros(2), list[float]()

    def gradients(dtype: torch.dtype) -> torch.Tensor:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        output = attention.attend_in_blocks(inputs[0], inputs[1], inputs[2], 0.3, None, sinks.to(dtype))
        return torch.cat([found.float() for found in torch.autograd.grad(output, inputs, dy.to(dtype))])

    expected = gradients(torch.float32)
    for scores in (2**24, 1):
        monkeypatch.setattr(attention, "SCORES_OF_A_BLOCK", scores)
        off.append(float((gradients(torch.bfloat16) - expected).norm()))
    assert off[1] < 1.2 * off[0]


@pytest.mark.parametrize(
    "model", [tiny_gpt_oss(), tiny_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=0)]
)
def test_no_scores_are_kept_for_the_backward(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens hold twice the memory, and no more."""
    monkeypatch.setattr(attention, "SCORES_OF_A_BLOCK", 1)
    base = wrap_model(model)
    segment = Segment(attach_lora(base).new_adapter(AdapterSpec(2), base.device), 0, 0)
    (held, most), (held_twice, most_twice) = (meter_pass(base, segment, 0, tokens) for tokens in (128, 256))
    assert held_twice < 2.1 * held
    assert most_twice < 2.4 * most


def test_two_models_in_one_process_keep_their_own_batches() -> None:
    first, second = wrap_model(tiny_qwen3(0)), wrap_model(tiny_qwen3(1))
    rows = sequences()
    before = packed_hidden_states(first, rows)
    packed_hidden_states(second, rows[:2])
    again = first.hidden_states(torch.cat(rows), torch.cat([torch.arange(len(r)) for r in rows]), grad=False)
    assert torch.equal(before, again)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: build(Gemma2Config(**SHAPE, attn_logit_softcapping=50.0)), "softcap=50.0"),
        (lambda: build(Gemma2Config(**SHAPE, attn_logit_softcapping=None)), "changes its logits after the output head"),
        (lambda: build(Llama4TextConfig(**SHAPE, attention_chunk_size=8)), "neither causal nor a sliding window"),
        (
            lambda: build(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)),
            "attention layers and positions alone",
        ),
    ],
    ids=["softcap", "softcap of the logits", "chunks", "no attention"],
)
def test_a_model_that_would_compute_something_else_is_refused(
    model: Callable[[], PreTrainedModel], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        wrap_model(model())
