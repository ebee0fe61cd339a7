"""What a count and a number are, wherever sizes and settings are checked. Imports nothing heavy."""

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real

LARGEST_SIZE = 2**20
"""Far beyond any model, and small enough that shapes can be computed with and compared."""
LARGEST_DEPTH = 2**10
DEPTHS = ("depth", "layer", "blocks", "mul")  # what is repeated costs time even without memory for weights
LARGEST_PATCH = 2**16
"""Tokens of the largest grid that positions are known for."""


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number of at least 1. True is none, though Python takes it for 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_finite(value: object) -> bool:
    """Whether ``value`` is a real number that a float can hold, neither infinite nor NaN, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond them
        return False


def wrong_counts(config: object, names: Iterable[str]) -> list[str]:
    """A line for each of the attributes ``names`` of ``config`` that is no count, or beyond any model's."""
    problems = []
    for name in names:
        value, largest = getattr(config, name), LARGEST_SIZE
        if name == "parallel_num":
            largest = LARGEST_PATCH
        elif any(part in name for part in DEPTHS):
            largest = LARGEST_DEPTH
        if not is_count(value) or value > largest:
            problems.append(f"{name} is {reprlib.repr(value)}; expected a whole number from 1 to {largest}")
    return problems
