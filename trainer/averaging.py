"""An exponential moving average of the float32 weights, each rank keeping that of its own fragments."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.zero_state import ZeroState


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights, after each step that was taken."""

    def __init__(self, state: ZeroState, decay: float):
        self._state, self._decay = state, decay
        self.values: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """The average is the present weights."""
        self.values = {f.name: f.states["master"].clone() for f in self._state.fragments()}

    @torch.no_grad()
    def update(self) -> None:
        for fragment in self._state.fragments():
            self.values[fragment.name].lerp_(fragment.states["master"], 1 - self._decay)
