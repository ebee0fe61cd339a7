"""Split an endless stream of samples over the resolution classes in a fixed ratio, exactly.

Each sample of the stream is given to a class so that at every moment each class has had its due to within
less than one sample ("the chairman assignment problem": Tijdeman, Discrete Mathematics 32, 1980). Fractions
of a sample thus carry over from step to step by themselves, and the count at any step is a table look-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import numpy as np


class ClassRatio:
    """How many samples of each class stand before any place of the stream.

    W is the sum of the weights over their greatest common divisor; the pattern repeats after W samples.
    """

    def __init__(self, weights: Mapping[int, int]):
        """
        Args:
            weights: class -> whole weight, at least one of them positive; classes of weight 0 are left out.

        Raises:
            ValueError: no positive weight, or a negative one.
        """
        if min(weights.values(), default=0) < 0 or not any(weights.values()):
            raise ValueError(
                f"a ratio needs whole weights, at least one of them positive; found {dict(weights)}"
            )
        divisor = gcd(*weights.values())
        self._weights = {name: weight // divisor for name, weight in weights.items() if weight}
        self._period = sum(self._weights.values())
        self._before = np.zeros((self._period + 1, len(self._weights)), np.int64)
        for place, chosen in enumerate(_assign_seats(list(self._weights.values()))):
            self._before[place + 1] = self._before[place]
            self._before[place + 1, chosen] += 1

    @property
    def classes(self) -> list[int]:
        """Classes with a positive weight, in the order given."""
        return list(self._weights)

    def counts_before(self, place: int) -> dict[int, int]:
        """Samples of each class among the first `place` samples of the stream.

        They add up to `place`, never fall as it grows, and differ from `place * weight / W` by less than one.
        """
        periods, rest = divmod(place, self._period)
        return {
            name: periods * weight + int(before)
            for (name, weight), before in zip(self._weights.items(), self._before[rest], strict=True)
        }


def _assign_seats(weights: list[int]) -> list[int]:
    """Tijdeman's rule over one period: the index of the weight that gets each of the sum(weights) places.

    With k weights and slack d = 1/(2k-2): of those whose due exceeds what they had by at least d, the one
    goes first that would otherwise be the first to be overdue by more than 1 - d. Everything is multiplied
    by (2k-2) * sum(weights), so that the comparison is exact.
    """
    total, unit = sum(weights), 2 * len(weights) - 2
    if not unit:
        return [0] * total
    had = [0] * len(weights)
    seats = []
    for place in range(1, total + 1):
        due = [i for i, weight in enumerate(weights) if unit * (weight * place - total * had[i]) >= total]
        # The deadline of i is (1 - d + had) / (weight / total); compared without its common factors.
        chosen = min(due, key=lambda i: ((unit - 1 + unit * had[i]) / weights[i], i))
        had[chosen] += 1
        seats.append(chosen)
    return seats
