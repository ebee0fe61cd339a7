"""Whether a step is taken: its loss and its gradient must be finite and not far outside what the run has seen
lately.

The verdict is a function of numbers that all ranks agree on, so all ranks come to the same one without
talking.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from trainer.recipe import GuardSection

# A window of nearly equal values has nearly no deviation, and then any noise would be an outlier: a deviation
# below this share of the mean counts as this share.
SMALLEST_DEVIATION = 0.01


class Guard:
    """Remembers the steps that were taken, and judges the next."""

    def __init__(self, section: GuardSection):
        self.section = section
        self.skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=section.window)
        self._norms: deque[float] = deque(maxlen=section.window)

    def verdict(self, loss: float, norm: float) -> str | None:
        """Why the step with this loss and gradient norm must not be taken; None where it may be."""
        for name, value, window in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if len(window) == window.maxlen:
                limit = self._limit(window)
                if value > limit:
                    sigmas = self.section.sigmas
                    return f"the {name} is {value:.4g}, above {limit:.4g} (mean + {sigmas:g} deviations)"
        return None

    def taken(self, loss: float, norm: float) -> None:
        """Note a step that was taken."""
        self._losses.append(loss)
        self._norms.append(norm)
        self.skipped_in_a_row = 0

    def skipped(self) -> None:
        """Note a step that was skipped."""
        self.skipped_in_a_row += 1

    @property
    def wants_rewind(self) -> bool:
        """So many steps in a row were skipped that the run should go back."""
        return self.skipped_in_a_row >= self.section.rewind_after

    def _limit(self, window: deque[float]) -> float:
        mean = statistics.fmean(window)
        deviation = max(statistics.pstdev(window, mean), SMALLEST_DEVIATION * abs(mean))
        return mean + self.section.sigmas * deviation

    def state(self) -> dict[str, Any]:
        """As JSON values, exactly."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "losses": [value.hex() for value in self._losses],
            "norms": [value.hex() for value in self._norms],
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; a window that has become shorter keeps the newest values."""
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(float.fromhex(value) for value in state["losses"])
        self._norms.extend(float.fromhex(value) for value in state["norms"])
