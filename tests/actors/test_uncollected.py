"""What is imported once and kept costs the collector nothing, and what comes after it is collected as ever."""

import gc
import weakref

import pytest

from lorry.actors.uncollected import uncollected


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_came_inside_is_not_walked_again() -> None:
    with uncollected():
        kept = Cycle()
        assert not gc.isenabled()
    assert all(each is not kept for each in gc.get_objects())


def test_afterwards_cycles_are_collected_even_if_it_failed() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gone = weakref.ref(Cycle())
    gc.collect()
    assert gone() is None
