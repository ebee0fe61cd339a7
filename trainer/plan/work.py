"""How long training takes and what it costs, from FLOPs, bytes and a few stated rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.plan.batches import BatchFigures
from trainer.plan.gpus import Gpu
from trainer.plan.states import BYTES, Parameters, Precision
from trainer.recipe import StageRecipe, ZeroSection

GPUS_PER_NODE = 8
GPU_HOURS_BETWEEN_FAILURES = 8064
"""Of H100 clusters: a job of 64 GPUs runs 126 hours until something breaks, one of 512 runs 16."""
HOST_NANOSECONDS = 2.5
"""An element's norm, clipping and Adam on one CPU thread; `benchmarks/host_optimizer.py` prints it."""
HOST_ELEMENTS = 4e9
"""A second, by all threads of a node: its memory gives about 40 bytes an element at 160 GB/s."""
HOST_LINK = 25e9
"""Bytes a second between a GPU and host memory that is pinned (PCIe 4 or 5)."""
RECOVERY_SECONDS = 600.0
"""From a failure until training has caught up with its start-up: requeue, load, first step."""


@dataclass(frozen=True)
class Work:
    """Time of a run.

    Attributes:
        compute_seconds: of a step, at the stated MFU.
        network_seconds: of a step, that weights and gradients travel; it overlaps with computing.
        host_seconds: of a step, for an optimizer in host memory; nothing overlaps with it.
        steps: of the run.
    """

    compute_seconds: float
    network_seconds: float
    host_seconds: float
    steps: int

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.network_seconds) + self.host_seconds


@dataclass(frozen=True)
class Saving:
    """Checkpoints.

    Attributes:
        bytes: of one checkpoint: float32 weights and both moments, and the average where there is one.
        mtbf_seconds: mean time between failures of the whole job.
        stall_seconds: that a save holds training up.
        best_seconds: between saves.
        effective: share of the time that counts, with that interval.
    """

    bytes: int
    mtbf_seconds: float
    stall_seconds: float

    @property
    def best_seconds(self) -> float:
        """Young's first-order optimum: sqrt(2 * stall * MTBF) (Young, 1974; Daly, 2006)."""
        return math.sqrt(2 * self.stall_seconds * self.mtbf_seconds)

    @property
    def effective(self) -> float:
        return self.effective_at(self.best_seconds)

    def effective_at(self, seconds: float) -> float:
        """Share of the time that counts where a save is made every so many seconds.

        Lost are the stalls, half an interval per failure, and the recovery from it.
        """
        lost = self.stall_seconds / seconds + (seconds / 2 + RECOVERY_SECONDS) / self.mtbf_seconds
        return max(0.0, 1 - lost)


def run_time(
    batch: BatchFigures,
    gpu: Gpu,
    ranks: int,
    mfu: float,
    recipe: StageRecipe,
    parameters: Parameters,
) -> Work:
    """Time of a step and of the run.

    Args:
        mfu: share of the GPU's peak that the FLOPs of forward and backward reach, over packs of mean cost;
            waiting for the heaviest pack comes on top.
    """
    compute = batch.flops * batch.imbalance / (ranks * gpu.peak_flops * mfu)
    zero = recipe.zero
    sent = network_bytes(parameters, zero, recipe.precision, batch.micro_steps, ranks)
    network = _seconds(sent.all_ranks, ranks, gpu) + _seconds(sent.within_copies, zero.copy_size, gpu)
    return Work(compute, network, _host_seconds(recipe, parameters, ranks), recipe.steps)


def _host_seconds(recipe: StageRecipe, parameters: Parameters, ranks: int) -> float:
    """The float32 gradient comes, every element of the rank's share is moved, and the new weight goes."""
    if not recipe.zero.offload_optimizer:
        return 0.0
    share, width = parameters.total / ranks, BYTES[recipe.precision]
    rate = min(1e9 / HOST_NANOSECONDS * recipe.world.threads, HOST_ELEMENTS / min(ranks, GPUS_PER_NODE))
    return share / rate + share * (4 + width) / HOST_LINK


def _seconds(sent: float, ranks: int, gpu: Gpu) -> float:
    """Time of collectives among so many ranks, each of which receives (ranks - 1)/ranks of the bytes."""
    # A ring enters and leaves each node once, so a node's network cards share the load among them.
    rate = gpu.nvlink if ranks <= GPUS_PER_NODE else min(gpu.nvlink, GPUS_PER_NODE * gpu.network)
    return sent * (ranks - 1) / ranks / rate


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step's collectives.

    Attributes:
        all_ranks: of those among all ranks.
        within_copies: of those among the ranks that share a second copy of the weights.
    """

    all_ranks: float
    within_copies: float = 0.0


def network_bytes(
    parameters: Parameters, zero: ZeroSection, precision: Precision, micro_steps: float, ranks: int
) -> Traffic:
    """What a step sends; each GPU receives (n - 1)/n of it where n ranks take part.

    Stage 3 gathers all weights for the forward and again for the backward pass, and reduces all gradients, in
    each micro-step. Stage 2 reduces in each micro-step, and gathers the new weights once. Stages 0 and 1 sum
    the step's gradients up once, which moves them twice, and stage 1 gathers the new weights. Weights that
    are not trained move in stage 3 only, where they are gathered too. Second copies (zero_hpz_partition_size)
    hold until the weights change: only a step's first gathering is among all ranks, of what is not trained
    none is.
    """
    width, trained, frozen = BYTES[precision], parameters.total, sum(parameters.frozen)
    if zero.stage < 3:
        return Traffic(width * trained * {0: 2.0, 1: 3.0, 2: micro_steps + 1.0}[zero.stage])
    reduced, gathered = micro_steps * trained, 2.0 * micro_steps * (trained + frozen)
    if zero.copy_size == 1 or ranks <= zero.copy_size:
        return Traffic(width * (reduced + gathered))
    return Traffic(width * (reduced + trained), width * (gathered - trained))
