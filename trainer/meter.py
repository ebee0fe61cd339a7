"""A step in numbers: what a line of `metrics.jsonl` holds, and what a person sees of it."""

from __future__ import annotations

import resource
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.packing import SampleCost
from foundation.progress import say
from trainer.agreement import StepReport
from trainer.costs import BACKWARD_AND_FORWARD
from trainer.metrics import first_trained
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from data_pipeline.loader import StepBatch
    from trainer.stage import Progress

REMEMBERED_STEPS = 50


class StepMeter:
    """Turns steps into lines. Only what depends on the clock or the machine differs between equal runs."""

    def __init__(self, run: RunFolder, recipe: StageRecipe, cost: SampleCost, ranks: int, speaks: bool):
        """
        Args:
            speaks: also tell a person, every `metrics.print_every` steps.
        """
        self._recipe, self._cost, self._ranks, self._speaks = recipe, cost, ranks, speaks
        self._began = first_trained(run)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    def line(
        self,
        progress: Progress,
        batch: StepBatch,
        means: dict[str, float],
        report: StepReport,
        lr: float,
        seconds: float,
        skip: str | None,
    ) -> dict[str, Any]:
        """The metrics of the step that has just ended.

        Units: losses as in `losses.StepLosses.means`; `seconds`, `data_wait` and `eta_seconds` in seconds;
        `memory_gb` of 1e9 bytes, of the rank that needs most, from its start to this step's backward pass
        (GPU: peak allocated; CPU: peak resident); `mfu`, `imbalance` (heaviest pack over the mean, by cost),
        `utilization` (of the packs' tokens) and `effective_share` (time in steps that count, since the first
        start that trained) are ratios.
        """
        self._seconds.append(seconds)
        step, typical = progress.step - 1, sum(self._seconds) / len(self._seconds)
        line: dict[str, Any] = {"step": step, **means, "grad_norm": report.norm, "lr": lr}
        # JSON has no NaN: a step that was skipped for one says so in words.
        line = {
            key: value if value == value and abs(value) != float("inf") else None
            for key, value in line.items()
        }
        if skip is not None:
            line["skipped"] = skip
        assignment, counts = batch.assignment, batch.counts
        # Costs are counted in thousandths of a token's.
        flops = BACKWARD_AND_FORWARD * int(assignment.costs.sum()) * self._cost.per_token / 1000
        line |= {
            "images": progress.images,
            "tokens": progress.tokens,
            "micro_steps": len(batch.micro_batches),
            "utilization": round(assignment.utilization, 4),
            "imbalance": round(assignment.imbalance, 4),
            "seconds": round(seconds, 5),
            "data_wait": round(report.data_wait, 5),
            "images_per_second": round(counts.samples / seconds, 3),
            "tokens_per_second": round(counts.tokens / seconds, 1),
            "tflops_per_device": round(flops / seconds / self._ranks / 1e12, 4),
            "memory_gb": round(report.memory / 1e9, 3),
            "eta_seconds": round(typical * (self._recipe.steps - progress.step), 1),
            "effective_share": round(progress.seconds / max(progress.seconds, time.time() - self._began), 4),
        }
        if self._recipe.metrics.peak_tflops:
            line["mfu"] = round(line["tflops_per_device"] / self._recipe.metrics.peak_tflops, 4)
        if self._speaks and (
            progress.step % self._recipe.metrics.print_every == 0 or progress.step == self._recipe.steps
        ):
            say(self._sentence(line, progress.step))
        return line

    def _sentence(self, line: dict[str, Any], done: int) -> str:
        minutes, seconds = divmod(round(line["eta_seconds"]), 60)
        by_class = " ".join(
            f"{key.removeprefix('vision_loss_')}px {value:.4f}"
            for key, value in line.items()
            if key.startswith("vision_loss_") and value is not None
        )
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        return (
            f"step {done}/{self._recipe.steps}  loss {loss} ({by_class})  norm {line['grad_norm'] or 0:.3f}  "
            f"lr {line['lr']:.2e}  {line['images_per_second']:.1f} images/s  {minutes}:{seconds:02} left"
        )


def memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
