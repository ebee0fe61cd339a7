"""The windowed shuffle: every sample once per epoch, any position alone, at any size."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.keyed_hash import derive_key, permute, uniform
from data_pipeline.order import WindowedShuffle

shard_lists = st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(any)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=50)
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, derive_key(seed))) == list(range(size))


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=30), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=50)
def test_many_permutations_at_once_equal_each_alone(sizes: list[int], seed: int) -> None:
    keys, last = derive_key(seed, np.arange(len(sizes))), np.array(sizes) - 1
    alone = [permute(size - 1, size, keys[i : i + 1]).item() for i, size in enumerate(sizes)]
    assert permute(last, sizes, keys).tolist() == alone


def test_permutations_of_few_things_are_equally_likely() -> None:
    keys = derive_key(np.arange(24_000), 5)
    orders = np.stack([permute(np.full(24_000, i), 4, keys) for i in range(4)], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24  # 1000 of each expected, with a standard deviation of 31
    assert counts.min() > 850 and counts.max() < 1150


def test_places_in_a_large_permutation_are_uniform() -> None:
    places = permute(np.arange(20_000), 10**9, derive_key(1))  # neighbours must not stay neighbours
    counts = np.histogram(places, bins=20, range=(0, 10**9))[0]
    assert counts.min() > 850 and counts.max() < 1150
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.03


def test_uniform_numbers_are_uniform_and_keys_depend_on_every_part_and_their_order() -> None:
    draws = uniform(derive_key(3, 7, np.arange(50_000)))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs((draws < 0.1).mean() - 0.1) < 0.01
    assert len({int(derive_key(*parts)[0]) for parts in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (1, 3)]}) == 5


@given(sizes=shard_lists, window=st.integers(1, 8), seed=st.integers(0, 1000), epoch=st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_every_sample_once_per_epoch(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = WindowedShuffle(sizes, window, seed, stream=256)
    first = epoch * order.samples
    ids = order.sample_ids(np.arange(first, first + order.samples))
    assert sorted(ids) == list(range(sum(sizes)))


@given(sizes=shard_lists, window=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_position_alone_equals_the_position_reached_by_iterating(
    sizes: list[int], window: int, data: st.DataObject
) -> None:
    order = WindowedShuffle(sizes, window, 3, 512)
    iterated = np.concatenate([order.sample_ids(np.arange(x, x + 5)) for x in range(0, 3 * order.samples, 5)])
    positions = data.draw(st.lists(st.integers(0, len(iterated) - 1), min_size=1))
    fresh = WindowedShuffle(sizes, window, 3, 512)
    assert fresh.sample_ids(positions).tolist() == iterated[positions].tolist()


def test_a_window_reads_only_its_shards_and_mixes_them() -> None:
    sizes, window = np.full(40, 25), 5
    order = WindowedShuffle(sizes, window, 1, 1)
    shards = order.sample_ids(np.arange(order.samples)) // 25
    by_window = shards.reshape(-1, window * 25)
    assert all(len(set(row)) == window for row in by_window)
    assert all(len(set(row[:25])) == window for row in by_window)  # not one shard after the other
    assert sorted({frozenset(row) for row in by_window}, key=min) != [
        frozenset(range(i, i + window)) for i in range(0, 40, window)
    ]


def test_epochs_seeds_and_streams_have_unrelated_orders() -> None:
    def start(seed: int, stream: int, epoch: int) -> list[int]:
        order = WindowedShuffle(np.full(50, 20), 8, seed, stream)
        return order.sample_ids(np.arange(1000) + 1000 * epoch).tolist()

    orders = [start(0, 1, 0), start(0, 1, 1), start(1, 1, 0), start(0, 2, 0)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 1 expected


def test_the_order_of_a_run_that_has_begun_does_not_change() -> None:
    """A checkpoint holds no order: a program that computed another one would go on with other samples."""
    order = WindowedShuffle([5, 0, 7, 3, 9, 4], 2, 1234, 256)
    ids = order.sample_ids(np.arange(14) * 5).tolist()
    assert ids == [17, 21, 26, 11, 0, 13, 27, 18, 16, 14, 10, 8, 25, 5]


def test_a_billion_samples_cost_no_more_than_a_window() -> None:
    order = WindowedShuffle(np.full(61_036, 16_384), 64, 0, 1024)
    order.sample_ids(np.arange(2560))
    begin = time.process_time()
    for first in (10, 500_000_000, 999_990_000):
        ids = order.sample_ids(np.arange(first, first + 2560))
        assert len(set(ids)) == 2560 and ids.max() < order.samples
        assert len(set(ids // 16_384)) <= 2 * 64
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(("sizes", "window"), [([], 1), ([0, 0], 1), ([3], 0)])
def test_impossible_shuffles_are_refused(sizes: list[int], window: int) -> None:
    with pytest.raises(ValueError, match="needs samples and a window"):
        WindowedShuffle(sizes, window, 0, 0)
