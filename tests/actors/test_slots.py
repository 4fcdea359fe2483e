import pytest
import torch

from lorry.actors.adapters.slots import AdapterPool
from lorry.actors.model.adapter import Adapter
from lorry.actors.model.spec import AdapterSpec, Target

TARGETS = [Target(0, "q_proj", 3, 5, "attn")]


def pool_of(keys: str, slots: int) -> AdapterPool:
    """The meta device stands for the accelerator: nothing but its name is needed here."""
    pool = AdapterPool(slots, "meta")
    for key in keys:
        pool.add(key, Adapter(AdapterSpec(2), TARGETS))
    return pool


def test_an_adapter_is_warm_until_it_is_acquired() -> None:
    pool = pool_of("ab", 2)
    assert pool.hot == []
    (adapter,) = pool.acquire(["a"])
    assert adapter.device == torch.device("meta")
    assert adapter.grad.device == torch.device("meta")
    assert pool.get("b").device == torch.device("cpu")
    assert (pool.swaps_in, pool.swaps_out) == (1, 0)


class Recorder(Adapter):
    """A meta tensor cannot come back, so moves are noted rather than made."""

    def to(self, device: torch.device | str) -> None:
        if not hasattr(self, "moves"):
            self.moves: list[str] = []
            super().to("cpu")
        self.moves.append(str(device))


def test_the_least_recently_used_adapter_makes_room() -> None:
    pool = AdapterPool(2, "meta")
    for key in "abc":
        pool.add(key, Recorder(AdapterSpec(2), TARGETS))
    for key in "abac":
        pool.acquire([key])
    assert pool.hot == ["a", "c"]
    assert (pool.swaps_in, pool.swaps_out) == (3, 1)
    assert pool.get("b").moves[-1] == "cpu"  # pyright: ignore[reportAttributeAccessIssue]


def test_an_adapter_that_is_wanted_now_is_never_the_one_to_go() -> None:
    pool = AdapterPool(2, "meta")
    for key in "abc":
        pool.add(key, Recorder(AdapterSpec(2), TARGETS))
    pool.acquire(["a", "b"])
    pool.acquire(["c", "a"])
    assert set(pool.hot) == {"a", "c"}


def test_an_adapter_that_is_pinned_stays_and_takes_up_room() -> None:
    pool = AdapterPool(2, "meta")
    for key in "abc":
        pool.add(key, Recorder(AdapterSpec(2), TARGETS))
    pool.acquire(["a", "b"])
    with pool.pin(["a"]):
        pool.acquire(["b"])
        pool.acquire(["c"])
        assert pool.hot == ["a", "c"]
        assert pool.has_room(["a", "b"]) and not pool.has_room(["b", "c"])
        with pytest.raises(ValueError, match="beside 1 that are pinned"):
            pool.acquire(["b", "c"])
    assert pool.acquire(["b", "c"])


def test_what_is_hot_already_is_not_moved_again() -> None:
    pool = pool_of("ab", 2)
    for _ in range(3):
        pool.acquire(["a", "b"])
    assert pool.swaps_in == 2


def test_more_adapters_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2"):
        pool_of("abc", 2).acquire(["a", "b", "c"])


def test_an_unknown_key_is_refused_before_anything_moves() -> None:
    pool = pool_of("a", 2)
    with pytest.raises(KeyError, match="nobody"):
        pool.acquire(["a", "nobody"])
    assert pool.hot == []


def test_a_removed_adapter_frees_its_slot() -> None:
    pool = pool_of("ab", 1)
    pool.acquire(["a"])
    pool.remove("a")
    pool.acquire(["b"])
    assert (pool.hot, pool.swaps_out, len(pool)) == (["b"], 0, 1)


def test_a_key_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already"):
        pool_of("a", 1).add("a", Adapter(AdapterSpec(2), TARGETS))


@pytest.mark.parametrize("pending", [False, True])
def test_a_rolled_back_gradient_is_the_one_that_was_marked(pending: bool) -> None:
    adapter = Adapter(AdapterSpec(2), TARGETS)
    adapter.grad.fill_(3.0 if pending else 0.0)
    adapter.pending = pending
    adapter.mark()
    adapter.grad.add_(torch.nan)
    adapter.pending = True
    adapter.rollback()
    assert torch.equal(adapter.grad, torch.full_like(adapter.grad, 3.0 if pending else 0.0))
    assert adapter.pending == pending


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_host_memory_is_what_those_take_that_are_not_on_the_device(device: str) -> None:
    pool = AdapterPool(2, device)
    for key in "abc":
        pool.add(key, Recorder(AdapterSpec(2), TARGETS))
    each = pool.get("a").nbytes
    assert each == 4 * 4 * 2 * (3 + 5), "weights, gradient and two moments in float32"
    on_host = {"cpu": 3, "meta": 1}[device]
    assert pool.host_bytes == 3 * each
    pool.acquire(["a", "b"])
    assert pool.host_bytes == on_host * each
    pool.acquire(["c"])
    assert pool.host_bytes == on_host * each
    pool.remove("c")
    assert pool.host_bytes == {"cpu": 2, "meta": 1}[device] * each
    for key in "ab":
        pool.remove(key)
    assert pool.host_bytes == 0
