"""How many bytes of tensors a computation holds at its peak, without doing it.

Under torch's fake tensors every operation gives a tensor of the right shape and no data, so the real model at
its full size runs on a laptop in a second; here the storages that are alive are counted meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come to life inside, until they die.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count this tensor's storage, however often it is met."""
        self._alive.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._alive.discard(name)
        self.now -= size
