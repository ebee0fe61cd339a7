"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math

from trainer.recipe import OptimizerSection


def learning_rate(section: OptimizerSection, steps: int, step: int) -> float:
    """The learning rate of ``step`` (counted from 0) of ``steps``.

    It grows linearly over the warm-up, whose last step has the full `lr`; then it stays, or falls along half
    a cosine to `final_lr`, which the last step has.
    """
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return section.lr
    progress = (step - section.warmup_steps) / max(1, steps - 1 - section.warmup_steps)
    return section.final_lr + (section.lr - section.final_lr) * (1 + math.cos(math.pi * progress)) / 2
