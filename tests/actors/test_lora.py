import math

import pytest
import torch

from lorry.actors.model.base_model import wrap_model
from lorry.actors.model.in_flight import Segment
from lorry.actors.model.lora import LoraLinear, attach_lora, head_of
from lorry.actors.model.spec import AdapterSpec

from .models import tiny_llama, tiny_qwen3, tiny_qwen3_moe
from .workshop import Family, Workshop

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


def chosen(family: Family, spec: AdapterSpec) -> list[str]:
    targets = attach_lora(wrap_model(family()))
    return targets.peft_names(tuple(targets.select(spec)))[0]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (AdapterSpec(4), [*ATTENTION, *MLP, "lm_head"]),
        (AdapterSpec(4, train_mlp=False), [*ATTENTION, "lm_head"]),
        (AdapterSpec(4, train_attn=False, train_unembed=False), MLP),
        (AdapterSpec(4, train_attn=False, train_mlp=False), ["lm_head"]),
    ],
    ids=["all", "no mlp", "mlp", "unembed"],
)
@pytest.mark.parametrize("family", [tiny_qwen3, tiny_llama])
def test_a_spec_selects_its_groups_by_their_leaf_names(family: Family, spec: AdapterSpec, names: list[str]) -> None:
    assert chosen(family, spec) == sorted(names)


def test_full_names_are_given_where_a_leaf_name_would_match_a_module_that_is_not_trained() -> None:
    targets = attach_lora(wrap_model(tiny_qwen3()))
    some = tuple(target for target in targets.modules if target.name.startswith("model.layers.0.self_attn"))
    assert targets.peft_names(some)[0] == [f"model.layers.0.self_attn.{leaf}" for leaf in ATTENTION]


def test_experts_are_targets_and_routers_are_none() -> None:
    names = {target.name for target in attach_lora(wrap_model(tiny_qwen3_moe())).modules if "mlp" in target.name}
    leaves = ("gate_up_proj", "down_proj")
    assert names == {f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in leaves}


def test_a_tied_output_embedding_is_trained_without_the_input_embedding() -> None:
    shop = Workshop(tiny_qwen3(tie_word_embeddings=True))
    shop.add("run", AdapterSpec(4, train_attn=False, train_mlp=False))
    embedding = shop.base.model.get_input_embeddings()
    head = head_of(shop.base)
    assert head.weight is embedding.weight
    shop.base.in_flight.segments = [Segment(shop.pool.get("run"), 0, 3)]
    x = torch.randn(3, 32)
    assert not torch.equal(head(x), x @ embedding.weight.T)


def test_a_new_adapter_changes_nothing_and_is_drawn_from_its_seed() -> None:
    targets = attach_lora(wrap_model(tiny_qwen3()))
    one, same, other = (targets.new_adapter(AdapterSpec(4, seed=seed), "cpu") for seed in (1, 1, 2))
    assert torch.equal(one.weights, same.weights)
    assert not torch.equal(one.weights, other.weights)
    for target in one.targets:
        a, b = one.module_weights()[target.name]
        bound = 1 / math.sqrt(target.inputs)
        assert b.abs().max() == 0
        assert 0.5 * bound < a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)


def test_tokens_of_no_segment_see_the_bare_base_model() -> None:
    shop = Workshop(tiny_llama())
    shop.add("run", AdapterSpec(4))
    layer = shop.base.model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, LoraLinear)
    x = torch.randn(6, 32)
    bare = layer(x)
    shop.base.in_flight.segments = [Segment(shop.pool.get("run"), 2, 4)]
    y = layer(x)
    assert torch.equal(y[:2], bare[:2])
    assert torch.equal(y[4:], bare[4:])
    assert not torch.isclose(y[2:4], bare[2:4]).all()


def test_a_bias_is_kept() -> None:
    shop, plain = Workshop(tiny_llama(attention_bias=True)), tiny_llama(attention_bias=True)
    layer, linear = (m.get_submodule("model.layers.0.self_attn.q_proj") for m in (shop.base.model, plain))
    assert isinstance(linear, torch.nn.Linear)
    linear.bias.data.normal_()
    assert isinstance(layer, LoraLinear)
    layer.bias.data.copy_(linear.bias)
    shop.add("run", AdapterSpec(4, train_mlp=False))
    shop.base.in_flight.segments = [Segment(shop.pool.get("run"), 0, 1)]
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x)[1:], linear(x)[1:])
