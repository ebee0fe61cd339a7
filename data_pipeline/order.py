"""The order in which training sees the samples of one class: a windowed shuffle, computable at any position.

A class is an endless stream of samples. An epoch of it permutes the shards, takes them in groups of
`window`, and permutes the samples of each group among themselves; so every sample comes once per epoch, a
reader has only `window` shards open at a time, and neighbours in training are not neighbours in a shard.
All of it is a function of (seed, stream, epoch): nothing is drawn, kept or saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipeline.keyed_hash import Purpose, derive_key, permute, shuffled_range

Int64 = NDArray[np.int64]

_TABLES_KEPT = 4  # a batch touches one epoch or two; with prefetch, several threads may stand at a boundary


@dataclass(frozen=True)
class _EpochTable:
    """One epoch's shards: `shards[i]` is the i-th to be read and begins at place `starts[i]` of the epoch."""

    shards: Int64
    starts: Int64  # [shards + 1]


class WindowedShuffle:
    """Which sample stands at which position of a class's endless stream.

    Time and memory for a batch are O(batch · log shards), whatever the position. Besides, an epoch that is
    met for the first time costs one sort of the *shards* (5 ms for the 61 thousand that hold a billion
    samples of 4 KiB), never over the samples.
    """

    def __init__(self, shard_sizes: ArrayLike, window: int, seed: int, stream: int):
        """
        Args:
            shard_sizes: samples of each shard; zeros are allowed. Sample ids number the samples shard by
                shard.
            window: shards whose samples are mixed, at least 1.
            seed: the recipe's seed.
            stream: number of the class, so that classes of one recipe have unrelated orders.

        Raises:
            ValueError: no samples at all, or an impossible window.
        """
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self._sizes.sum())
        if self.samples < 1 or window < 1:
            raise ValueError(f"a shuffle needs samples and a window: {self.samples} samples, window {window}")
        self._first_ids = np.cumsum(self._sizes) - self._sizes
        self._window, self._seed, self._stream = window, seed, stream
        self._tables: dict[int, _EpochTable] = {}

    def sample_ids(self, positions: ArrayLike) -> Int64:
        """Sample ids at the given positions.

        Args:
            positions: integers from 0 on, in any order, one-dimensional; position x belongs to epoch
                `x // samples`.

        Returns:
            int64 ids in `[0, samples)`, of the shape of `positions`.
        """
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._within_epoch(int(epoch), places[here])
        return ids

    def _within_epoch(self, epoch: int, places: Int64) -> Int64:
        table = self._table(epoch)
        window_starts = np.append(table.starts[: -1 : self._window], self.samples)
        windows = np.searchsorted(window_starts, places, side="right") - 1
        begin, end = window_starts[windows], window_starts[windows + 1]
        key = derive_key(self._seed, self._stream, Purpose.WINDOW_ORDER, epoch, windows)
        shuffled = begin + permute(places - begin, end - begin, key)
        slots = np.searchsorted(table.starts, shuffled, side="right") - 1
        return self._first_ids[table.shards[slots]] + shuffled - table.starts[slots]

    def _table(self, epoch: int) -> _EpochTable:
        table = self._tables.get(epoch)
        if table is None:
            key = derive_key(self._seed, self._stream, Purpose.SHARD_ORDER, epoch)
            shards = shuffled_range(len(self._sizes), key)
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._sizes[shards])])
            table = self._tables[epoch] = _EpochTable(shards, starts)
            for old in list(self._tables)[:-_TABLES_KEPT]:
                self._tables.pop(old, None)  # another thread may have dropped it already
        return table
