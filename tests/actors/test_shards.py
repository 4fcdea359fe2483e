import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.model.shards import Heads, divided, share
from lorry.actors.model.spec import ExpertWeight, Shard, Target
from lorry.wire.errors import UnsupportedModelError

DIM = 8


def targets(heads: Heads, width: int, vocabulary: int, experts: int) -> list[Target]:
    """A layer's, and the head."""
    of_experts = ExpertWeight(experts, "a")
    return [
        Target(0, "layers.0.self_attn.q_proj", 32, heads.queries * DIM, "attn"),
        Target(1, "layers.0.self_attn.k_proj", 32, heads.keys * DIM, "attn"),
        Target(2, "layers.0.self_attn.v_proj", 32, heads.keys * DIM, "attn"),
        Target(3, "layers.0.self_attn.o_proj", heads.queries * DIM, 32, "attn"),
        Target(4, "layers.0.mlp.up_proj", 32, width, "mlp"),
        Target(5, "layers.0.mlp.down_proj", width, 32, "mlp"),
        Target(6, "layers.1.mlp.experts.gate_up_proj", 32, 2 * width, "mlp", of_experts),
        Target(7, "lm_head", 32, vocabulary, "unembed"),
    ]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(8, 70), st.integers(8, 70), st.data())
def test_whatever_the_ranks_have_is_all_there_is_and_nothing_twice_but_shared_keys(
    per_rank: int, ranks: int, groups: int, width: int, vocabulary: int, data: st.DataObject
) -> None:
    queries = per_rank * ranks * groups
    keys = data.draw(st.sampled_from([n for n in range(1, queries + 1) if queries % n == 0]))
    experts = data.draw(st.integers(1, 9))
    heads = Heads(queries, keys)
    if keys % ranks and ranks % keys:
        with pytest.raises(UnsupportedModelError, match=f"{keys} heads of keys and values"):
            divided(targets(heads, width, vocabulary, experts), heads, 0, ranks)
        return
    each = [divided(targets(heads, width, vocabulary, experts), heads, rank, ranks) for rank in range(ranks)]
    for of_ranks in zip(*each, strict=True):
        size = {"outputs": of_ranks[0].outputs, "inputs": of_ranks[0].inputs, "experts": experts}
        shards = [target.shard for target in of_ranks if target.shard is not None]
        covered = sorted(i for shard in shards for i in range(shard.start, shard.end))
        once = sorted(set(covered))
        assert once == list(range(size[shards[0].axis]))
        if of_ranks[0].index in (1, 2) and keys < ranks:
            assert len(covered) == len(once) * ranks // keys
        else:
            assert covered == once
        assert (
            max(shard.end - shard.start for shard in shards) <= of_ranks[0].most_outputs or shards[0].axis != "outputs"
        )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_a_ranks_queries_read_the_keys_that_it_has(per_key: int, keys: int, more: int) -> None:
    heads = Heads(per_key * keys * more, keys)
    for ranks in range(1, heads.queries + 1):
        if heads.queries % ranks or (keys % ranks and ranks % keys):
            continue
        for rank in range(ranks):
            queries, own_keys = (target.shard for target in divided(targets(heads, 8, 8, 1), heads, rank, ranks)[:2])
            assert queries is not None and own_keys is not None
            asked = {head // (heads.queries // keys) for head in range(queries.start // DIM, queries.end // DIM)}
            assert asked == set(range(own_keys.start // DIM, own_keys.end // DIM))


def test_what_is_not_known_to_be_divided_is_refused_by_name() -> None:
    heads = Heads(4, 2)
    with pytest.raises(
        UnsupportedModelError, match=r"4 attention heads cannot be divided among 3 devices.*divisor of 4"
    ):
        divided([], heads, 0, 3)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.qkv_proj is a layer that is not known"):
        divided([Target(0, "layers.0.self_attn.qkv_proj", 8, 24, "attn")], heads, 0, 2)


def test_shares_are_as_equal_as_can_be() -> None:
    assert [share(97, rank, 4) for rank in range(4)] == [(0, 24), (24, 48), (48, 72), (72, 97)]
    assert [share(3, rank, 4) for rank in range(4)] == [(0, 0), (0, 1), (1, 2), (2, 3)]


def test_narrow_states_of_latent_attention_are_every_ranks() -> None:
    (target,) = divided([Target(0, "layers.0.self_attn.q_a_proj", 8, 4, "attn")], Heads(4, 4), 1, 2)
    assert target.shard is None
    (target,) = divided([Target(0, "layers.0.self_attn.kv_b_proj", 4, 4 * 6, "attn")], Heads(4, 4), 1, 2)
    assert target.shard == Shard("outputs", 12, 24)
