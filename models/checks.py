"""What a count and a number are, wherever sizes and settings are checked. Imports nothing heavy."""

import math
from numbers import Integral, Real


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number of at least 1. True is none, though Python takes it for 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_finite(value: object) -> bool:
    """Whether ``value`` is a real number, neither infinite nor NaN, and no boolean."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
