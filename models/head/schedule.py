"""Time of the rectified flow: 0 is noise, 1 is data. All arithmetic is float32.

The association of `shift` matters: it moves some times by one unit in the last place even at s = 1, and a
seed gives the published image only if the times are the published ones. Sources: `time_shift_func` in
modeling/vision_head/sampling_x.py of the code published with the paper (arXiv 2602.14041); the logit-normal
density is that of arXiv 2403.03206.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.checks import is_count
from models.head.config import HeadConfig

# The solver leaves the SDE here: the velocity's denominator 1 - t is clamped at 0.05 (`models.head.flow`).
LAST_TIME = 0.95


def shift(t: Tensor, s: float) -> Tensor:
    """`(1/s) / ((1/s) + (1/t - 1))` in float32: s > 1 spends more time near the data; shift(0) = 0.

    Args: t, times in [0, 1], any shape `[...]` and float dtype; s > 0. Returns float32 `[...]` in [0, 1].
    """
    inverse = 1.0 / s  # a Python number: over a tensor, torch multiplies it by the reciprocal
    return inverse / (inverse + (1.0 / t.float() - 1.0))


def draw_times(
    config: HeadConfig,
    count: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Training times, one per group of P tokens: float32 `[count]` in [0, 1], on `device`.

    `logit_normal`: sigmoid(P_mean + P_std * n), n ~ N(0, 1); `uniform`: U(0, 1). One draw, then
    the time shift.
    """
    source = torch.device(device) if generator is None else generator.device
    if config.time_schedule == "logit_normal":
        normal = torch.randn(count, generator=generator, device=source)
        t = torch.sigmoid(normal * config.P_std + config.P_mean)
    else:
        t = torch.rand(count, generator=generator, device=source)
    t = t.to(device)
    return t if config.time_shift == 1.0 else shift(t, config.time_shift)


@dataclass(frozen=True)
class SamplingTimes:
    """The steps of a sampler: `steps` steps from times[i] over dts[i], then a last one from `last` to 1."""

    times: tuple[float, ...]  # float32 values
    dts: tuple[float, ...]
    last: float
    last_dt: float


def sampling_times(steps: int, time_shift: float) -> SamplingTimes:
    """t_i = shift(linspace(0, 0.95, steps + 1)); the last step runs from 0.95, or t_N where shifted.

    Raises ValueError if steps < 1.
    """
    if not is_count(steps):
        raise ValueError(
            f"sampling steps: found {steps!r}, expected a whole number of at least 1; 10 to 50 are useful"
        )
    t = shift(torch.linspace(0.0, LAST_TIME, steps + 1), time_shift)
    last = LAST_TIME if time_shift == 1.0 else float(t[-1])
    last_dt = 0.05 if time_shift == 1.0 else float(1.0 - t[-1])
    return SamplingTimes(tuple(t[:-1].tolist()), tuple((t[1:] - t[:-1]).tolist()), last, last_dt)
