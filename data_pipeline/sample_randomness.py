"""Everything that is drawn for one sample of a step: bit flips, times and noise.

The generator is numpy's Philox, a counter-based one: its key is (seed, class), and the upper half of its
counter is the sample's position in the stream of its class. So the draws of a sample depend on nothing
else, neither on the ranks nor on what was drawn before, and no two samples share any. h, w token grid, P
tokens of a patch, M = h*w/P patches, C bits a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.head import HeadConfig
from models.head.schedule import shift


@dataclass(frozen=True)
class Draws:
    """What was drawn for one picture.

    Attributes:
        flip: bool `[h*w, C]`, plain raster: input bits to flip.
        t: float32 `[M]` in [0, 1], the head's time shift applied.
        noise: float32 `[M, P, C]`, standard normal.
    """

    flip: Tensor
    t: Tensor
    noise: Tensor


class SampleDraws:
    """Draws for a sample at a position of a class's stream."""

    def __init__(self, seed: int, bit_flip: float, head: HeadConfig):
        """
        Args:
            seed: the recipe's seed, in `[0, 2**63)`.
            bit_flip: p_max: a bit flips where a < p_max * b for two uniform draws a, b; p_max / 2 on average.
            head: tells C, P and the density of t.

        Raises:
            ValueError: a head that wants several draws of (t, noise) per target; a pack holds one.
        """
        if head.diff_batch_mul != 1:
            raise ValueError(
                f"the head wants {head.diff_batch_mul} draws of (t, noise) per target (diff_batch_mul), "
                "a pack holds one: set it to 1"
            )
        self._seed, self._bit_flip, self._head = seed, np.float32(bit_flip), head

    def draw(self, resolution: int, position: int, h: int, w: int) -> Draws:
        """The draws of one sample, all float32, in this order:

        1. a, uniform `[h*w, C]`; 2. b, uniform `[h*w, C]`; flip = a < p_max * b;
        3. `[M]`, n standard normal, t = sigmoid(P_mean + P_std * n), or t uniform by the head's schedule;
        4. noise, standard normal `[M, P, C]`.
        """
        head = self._head
        generator = np.random.Generator(
            np.random.Philox(counter=[0, 0, position, 0], key=[self._seed, resolution])
        )
        tokens, patches = h * w, h * w // head.parallel_num
        a = generator.random((tokens, head.ch_target), dtype=np.float32)
        b = generator.random((tokens, head.ch_target), dtype=np.float32)
        if head.time_schedule == "logit_normal":
            normal = generator.standard_normal(patches, dtype=np.float32)
            t = torch.sigmoid(torch.from_numpy(normal) * head.P_std + head.P_mean)
        else:
            t = torch.from_numpy(generator.random(patches, dtype=np.float32))
        noise = generator.standard_normal((patches, head.parallel_num, head.ch_target), dtype=np.float32)
        return Draws(
            flip=torch.from_numpy(a < self._bit_flip * b),
            t=t if head.time_shift == 1.0 else shift(t, head.time_shift),
            noise=torch.from_numpy(noise),
        )
