"""Random numbers that are functions of their key: no state, any order, vectorized.

What a training step contains must be computable from its number alone, so the choices that the plan makes
for a sample (its place in an epoch, its task, whether its caption is dropped) are hashes of (seed, purpose,
place) and not draws from a generator that somebody has to carry along.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt64 = NDArray[np.uint64]

# The golden ratio's fraction as an odd 64-bit number: spreads small consecutive integers far apart.
_WEYL = np.uint64(0x9E3779B97F4A7C15)
# On fewer bits a Feistel network reaches some permutations of a handful of things twice as often as others.
_LEAST_BITS = np.uint64(6)
_ROUND_KEYS = np.arange(8, dtype=np.uint64) * _WEYL


class Purpose(IntEnum):
    """What a key is for; part of the key, so that two uses of one seed are unrelated."""

    SHARD_ORDER = 1
    WINDOW_ORDER = 2
    TASK = 3
    DROP_TEXT = 4


def mix(value: UInt64) -> UInt64:
    """A bijection of 64-bit integers in which every output bit depends on every input bit.

    Two rounds of xor-shift and multiplication by odd constants (the finalizer of SplitMix64: Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def derive_key(*parts: ArrayLike) -> UInt64:
    """Hash integers (or arrays of them, broadcast) into a 64-bit key; their order matters.

    Args:
        parts: non-negative integers below 2**63, at least one.

    Returns:
        uint64, of the parts' broadcast shape, at least one-dimensional.
    """
    columns = [np.atleast_1d(np.asarray(part)).astype(np.uint64) for part in parts]
    return reduce(lambda key, part: mix((key + part + np.uint64(1)) * _WEYL), columns, np.zeros(1, np.uint64))


def uniform(key: UInt64) -> NDArray[np.float64]:
    """A number in [0, 1) for each key: its upper 53 bits."""
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled_range(size: int, key: UInt64) -> NDArray[np.int64]:
    """A whole pseudo-random permutation of `range(size)`; for all of it at once, faster than `permute`.

    Args:
        size: below 2**63.
        key: uint64, one element.

    Returns:
        int64 [size]: the integers in the order of their hashes, which all differ, since `mix` is a bijection
        and the multiples of an odd number below 2**64 of them differ.
    """
    return np.argsort(mix(key + np.arange(size, dtype=np.uint64) * _WEYL)).astype(np.int64)


def permute(index: ArrayLike, size: ArrayLike, key: UInt64) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of `range(size)` puts each index, in O(1) time and memory each.

    A Feistel network over the smallest number of bits that holds the size is a bijection of that power of two
    (Luby and Rackoff, 1988); what lands outside of the size is sent through it again until it lands inside
    ("cycle walking": Black and Rogaway, 2002), which keeps it a bijection. From 32 on the domain is at most
    twice the size, so an index takes at most two passes on average.

    Args:
        index: integers in `[0, size)`.
        size: sizes of the permuted ranges, below 2**53; broadcast against `index`.
        key: uint64 keys, broadcast likewise; one permutation for each pair (size, key).

    Returns:
        int64, of the broadcast shape.
    """
    columns = [np.atleast_1d(np.asarray(column).astype(np.uint64)) for column in (index, size, key)]
    shape = np.broadcast_shapes(*(column.shape for column in columns))
    # What is the same for all stays one number, and is hashed once.
    places, sizes, keys = (
        column.ravel() if column.size == 1 else np.broadcast_to(column, shape).ravel() for column in columns
    )
    # frexp gives the exponent e of the first power of two above its argument: 2**(e-1) <= x < 2**e.
    bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    bits = np.maximum(bits, _LEAST_BITS)
    places = np.array(np.broadcast_to(places, (math.prod(shape),)))
    walking = np.arange(places.size)

    def of_walking(column: UInt64) -> UInt64:
        return column if column.size == 1 else column[walking]

    while walking.size:
        places[walking] = _feistel(places[walking], of_walking(bits), of_walking(keys))
        walking = walking[places[walking] >= of_walking(sizes)]
    return places.astype(np.int64).reshape(shape)


def _feistel(value: UInt64, bits: UInt64, key: UInt64) -> UInt64:
    """An alternating Feistel network over `bits` bits, whose halves differ by at most one bit."""
    one = np.uint64(1)
    left_bits = bits >> one
    right_bits = bits - left_bits
    left_mask, right_mask = (one << left_bits) - one, (one << right_bits) - one
    left, right = value >> right_bits, value & right_mask
    for number, round_key in enumerate(_ROUND_KEYS):
        if number % 2 == 0:
            left = left ^ (mix(right ^ mix(key + round_key)) & left_mask)
        else:
            right = right ^ (mix(left ^ mix(key + round_key)) & right_mask)
    return (left << right_bits) | right
