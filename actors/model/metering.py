"""What tensors a computation holds, counted from its operators: the same number on any device, and on none."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Inside, `live` bytes of tensors were made and are still held, and `peak` is the most that were at a time. What an
    operator has inside itself it does not see, nor what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, is_new=False)
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            self._note(tensor, is_new=True)
        return found

    def _note(self, value: object, *, is_new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if (key := id(storage)) in self._known:
            return
        size = storage.nbytes() if is_new else 0

        def gone(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
