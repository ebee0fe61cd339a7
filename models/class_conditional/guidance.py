"""How strong classifier-free guidance is at each autoregressive step.

Sources: guidance is arXiv 2207.12598; the schedules are those of `head_sample` in
imagenet_gen/src/model_parallel.py of the code published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

from typing import Literal, get_args

GuidanceSchedule = Literal["linear", "constant"]


def wrong_schedule(schedule: object) -> list[str]:
    """A line where no schedule has this name."""
    known = list(get_args(GuidanceSchedule))
    return [] if schedule in known else [f"schedule is {schedule!r}: expected one of {known}"]


def guidance_at(step: int, steps: int, guidance: float, schedule: GuidanceSchedule) -> float:
    """Scale at step `step` of `steps`: 1 + (guidance - 1) step / steps ("linear", published), or `guidance`.

    step runs from 0 to steps - 1, and guidance is at least 1, so the scale is in [1, guidance]; a linear one
    never reaches `guidance` itself. Nothing is checked here.
    Under "linear" the first step has scale 1: both halves of the batch are then sampled, each on its own.
    """
    return 1.0 + (guidance - 1.0) * step / steps if schedule == "linear" else guidance
