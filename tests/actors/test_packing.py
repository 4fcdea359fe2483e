from hypothesis import given
from hypothesis import strategies as st

from lorry.actors.training.packing import Row, pack

ROWS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 20)), max_size=30).map(
    lambda chosen: [Row(0, i, adapter, length) for i, (adapter, length) in enumerate(chosen)]
)


@given(rows=ROWS, token_budget=st.integers(1, 50), slots=st.integers(1, 4))
def test_every_row_is_packed_once_within_budget_and_slots(rows: list[Row], token_budget: int, slots: int) -> None:
    passes = pack(rows, token_budget, slots)
    assert sorted((row for each in passes for row in each.rows), key=lambda row: row.datum) == rows
    for each in passes:
        assert each.tokens <= token_budget or len(each.rows) == 1
        assert len({row.adapter for row in each.rows}) <= slots


@given(rows=ROWS, token_budget=st.integers(1, 50), slots=st.integers(1, 4))
def test_every_adapter_owns_one_segment_of_a_pass(rows: list[Row], token_budget: int, slots: int) -> None:
    for each in pack(rows, token_budget, slots):
        segments = each.segments()
        assert len({adapter for adapter, _, _ in segments}) == len(segments)
        assert [start for _, start, _ in segments] == [0, *(end for _, _, end in segments[:-1])]
        assert segments[-1][2] == each.tokens


@given(rows=ROWS, token_budget=st.integers(1, 50), slots=st.integers(1, 4))
def test_an_adapter_is_never_left_and_taken_up_again(rows: list[Row], token_budget: int, slots: int) -> None:
    visits = [adapter for each in pack(rows, token_budget, slots) for adapter, _, _ in each.segments()]
    stays = [adapter for i, adapter in enumerate(visits) if i == 0 or visits[i - 1] != adapter]
    assert len(stays) == len(set(stays))


def test_rows_of_equal_length_lie_next_to_each_other() -> None:
    rows = [Row(i % 2, i, "a", length) for i, length in enumerate((3, 5, 3, 5, 3))]
    (only,) = pack(rows, 100, 1)
    assert [row.length for row in only.rows] == [3, 3, 3, 5, 5]
