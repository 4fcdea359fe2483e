import json
from pathlib import Path

import pytest
import torch

from lorry.actors.model.base_model import load_base_model, wrap_model
from lorry.actors.model.lora import attach_lora
from lorry.wire.errors import UnsupportedModelError

from .models import tiny_llama, tiny_qwen3, tiny_qwen3_vl, tiny_qwen3_vl_moe
from .workshop import Family


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_qwen3().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_loads_in_its_own_dtype(saved: Path) -> None:
    base = load_base_model(saved)
    assert (base.dtype, base.vocab_size, base.max_context, base.end_tokens) == (torch.bfloat16, 97, 256, (96,))


def test_the_operator_may_ask_for_another_dtype(saved: Path) -> None:
    base = load_base_model(saved, dtype="float32")
    assert base.dtype == torch.float32
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", [tiny_qwen3_vl, tiny_qwen3_vl_moe])
def test_a_model_with_eyes_is_loaded_and_computes_text(family: Family, tmp_path: Path) -> None:
    model = family()
    model.save_pretrained(tmp_path)
    base, tokens = load_base_model(tmp_path, dtype="float32"), torch.arange(9)
    assert {target.group for target in attach_lora(base).modules} == {"attn", "mlp", "unembed"}
    base.in_flight.lengths = [9]
    with torch.no_grad():
        expected = model(tokens[None], use_cache=False).logits[0]
        torch.testing.assert_close(base.logits(base.hidden_states(tokens, tokens, grad=False)), expected)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=str(tmp_path)):
        load_base_model(tmp_path)


def test_code_that_lies_beside_the_weights_is_not_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where whoever holds standard input would say yes to it."""
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    marker = tmp_path / "was-run"
    (saved / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="custom code"):
        load_base_model(saved)
    assert not marker.exists()


def test_a_dtype_that_does_not_exist_is_refused(saved: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'float31'"):
        load_base_model(saved, dtype="float31")


def test_the_generation_config_names_the_end_tokens() -> None:
    model = tiny_llama()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [3, 5]
    assert wrap_model(model).end_tokens == (3, 5)


def test_no_parameter_of_a_base_model_takes_a_gradient() -> None:
    base = wrap_model(tiny_qwen3())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_hidden_states_carry_a_graph_only_when_asked() -> None:
    base = wrap_model(tiny_qwen3())
    base.in_flight.lengths = [3]
    tokens = torch.tensor([5, 6, 7])
    without, with_graph = (base.hidden_states(tokens, torch.arange(3), grad=grad) for grad in (False, True))
    assert not without.requires_grad
    assert with_graph.requires_grad
    torch.testing.assert_close(without, with_graph.detach())
