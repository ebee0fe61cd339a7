"""Keys and values of a growing sequence, in memory that is reserved once.

H heads of width e. Source: nothing of the arithmetic changes; it is the decoding of the paper (arXiv
2602.14041) without computing earlier keys and values again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.class_conditional.config import ClassConditionalConfig
from models.class_conditional.layers import Attend


class KeyValueCache:
    """Per layer `[2, rows, H, positions, e]`, keys then values, in the `dtype` given; `length` are filled.

    A forward pass over T new positions gives every layer its `remembering`, then calls `advance(T)`.
    """

    def __init__(
        self, config: ClassConditionalConfig, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, rows, config.n_head, config.sequence, config.dim // config.n_head)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.length = 0

    def remembering(self, layer: int, attend: Attend) -> Attend:
        """`attend` of new positions to those in the cache of `layer` and to themselves, which it stores."""

        def attend_and_store(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            end = self.length + q.shape[2]
            keys, values = self.layers[layer].unbind(0)
            keys[:, :, self.length : end] = k
            values[:, :, self.length : end] = v
            return attend(q, keys[:, :, :end], values[:, :, :end])

        return attend_and_store

    def advance(self, positions: int) -> None:
        """End a pass over so many new positions: the next ones are stored after them."""
        self.length += positions

    def take_rows(self, other: KeyValueCache, rows: Tensor) -> None:
        """Fill this cache with the rows of another one that `rows` names.

        rows: int64 `[rows of this one]`, indices into the other's, repetitions allowed.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[..., : other.length, :] = theirs[:, rows, :, : other.length]
        self.length = other.length
