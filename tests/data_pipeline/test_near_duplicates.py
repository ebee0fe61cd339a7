"""Near-duplicates by block permutations agree with comparing every pair."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.near_duplicates import block_masks, find_near_duplicates
from data_pipeline.npy_stream import NpyStream


def losers(hashes, distance):
    connection = duckdb.connect()
    ranks = np.arange(len(hashes), dtype=np.uint64)
    connection.register("given", pa.table({"rank": ranks, "phash": np.array(hashes, np.uint64)}))
    count = find_near_duplicates(connection, "SELECT * FROM given", distance, "found")
    found = sorted(row[0] for row in connection.execute("SELECT rank FROM found").fetchall())
    assert count == len(found)
    return found


def plain(hashes, distance):
    return [
        i for i, h in enumerate(hashes) if any((h ^ other).bit_count() <= distance for other in hashes[:i])
    ]


@pytest.mark.parametrize("distance", [0, 1, 3, 5])
def test_agrees_with_all_pairs(distance):
    rng = np.random.default_rng(distance)
    hashes = [int(h) for h in rng.integers(0, 2**64, 300, dtype=np.uint64)]
    for _ in range(300):  # near copies, at every distance around the limit
        flips = rng.choice(64, rng.integers(0, distance + 3), replace=False)
        hashes.append(hashes[rng.integers(len(hashes))] ^ sum(1 << int(bit) for bit in flips))
    expected = plain(hashes, distance)
    assert 50 < len(expected) < 300
    assert losers(hashes, distance) == expected


@pytest.mark.parametrize("distance", [1, 3])
def test_crowds_agree_with_all_pairs(distance):
    """Hashes that share most of their bits, as those of white pictures do, beside others."""
    rng = np.random.default_rng(distance)
    flat = rng.integers(0, 1 << 20, 600, dtype=np.uint64) | np.uint64(0xAAAAAAAAAAA00000)
    others = rng.integers(0, 2**64, 100, dtype=np.uint64)
    hashes = [int(h) for h in rng.permutation(np.concatenate([flat, others, flat[:20] ^ np.uint64(1 << 60)]))]
    expected = plain(hashes, distance)
    assert 20 <= len(expected) < 600
    assert losers(hashes, distance) == expected


def test_a_chain_leaves_its_best():
    chain = [0, 0b111, 0b111111, 0b111111111]
    assert losers(chain, 3) == [1, 2, 3]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7), st.data())
def test_hashes_within_the_distance_agree_under_some_mask(distance, data):
    flips = data.draw(st.lists(st.integers(0, 63), max_size=distance, unique=True))
    difference = sum(1 << bit for bit in flips)
    bits = difference | data.draw(st.integers(0, 2**64 - 1))
    assert any(difference & mask == 0 for mask in block_masks(distance, bits))


@pytest.mark.parametrize("pieces", [[], [[]], [[1, 2], [], [3]]])
def test_npy_stream_reads_back(tmp_path, pieces):
    with NpyStream(tmp_path / "a.npy", "<u2") as stream:
        for piece in pieces:
            stream.append(np.array(piece, np.int64))
    read = np.load(tmp_path / "a.npy", mmap_mode="r" if any(pieces) else None, allow_pickle=False)
    assert read.dtype == np.uint16
    assert read.tolist() == [value for piece in pieces for value in piece]
