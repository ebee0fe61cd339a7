"""How strong classifier-free guidance is at each autoregressive step.

Sources: guidance is arXiv 2207.12598; the schedules are those of `head_sample` in
imagenet_gen/src/model_parallel.py of the code published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

from typing import Literal, get_args

from models.checks import is_finite

GuidanceSchedule = Literal["linear", "constant"]


def check_guidance(guidance: float, schedule: str) -> None:
    """Raise ValueError unless guidance >= 1 and the schedule is known."""
    if not (is_finite(guidance) and guidance >= 1.0):
        raise ValueError(f"guidance: found {guidance!r}, expected a number of at least 1; 1 switches it off")
    if schedule not in get_args(GuidanceSchedule):
        known = list(get_args(GuidanceSchedule))
        raise ValueError(f"guidance schedule: found {schedule!r}, expected one of {known}")


def guidance_at(step: int, steps: int, guidance: float, schedule: GuidanceSchedule) -> float:
    """Scale at step `step` of `steps`: 1 + (guidance - 1) step / steps ("linear", published), or `guidance`.

    step runs from 0 to steps - 1, and guidance is at least 1, so the scale is in [1, guidance]; a linear one
    never reaches `guidance` itself. Nothing is checked here: see `check_guidance`.
    Under "linear" the first step has scale 1: both halves of the batch are then sampled, each on its own.
    """
    return 1.0 + (guidance - 1.0) * step / steps if schedule == "linear" else guidance
