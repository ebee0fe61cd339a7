"""What a count and a number are, wherever sizes and settings are checked. Imports nothing heavy."""

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real

# Far beyond any model, and small enough that shapes can be computed with and compared.
LARGEST_WIDTH = 2**20
LARGEST_DEPTH = 2**10  # what is repeated costs time even without memory for weights
LARGEST_PATCH = 2**16  # tokens of the largest grid that positions are known for


class WrongRequest(ValueError):
    """Something asked for that does not suit the weights, with which nothing is wrong."""


def is_count(value: object, at_most: float = math.inf) -> bool:
    """Whether ``value`` is a whole number from 1 to ``at_most``; True, which Python takes for 1, is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) <= at_most


def is_finite(value: object) -> bool:
    """Whether ``value`` is a real number that a float can hold, neither infinite nor NaN, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond them
        return False


def wrong_counts(config: object, names: Iterable[str], at_most: int) -> list[str]:
    """A line for each of the attributes ``names`` of ``config`` that is no count up to ``at_most``."""
    return [
        f"{name} is {reprlib.repr(getattr(config, name))}; expected a whole number from 1 to {at_most}"
        for name in names
        if not is_count(getattr(config, name), at_most)
    ]
