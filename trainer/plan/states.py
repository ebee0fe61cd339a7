"""Bytes that training keeps from step to step, on one GPU, by ZeRO stage.

N parameters, R ranks, b bytes of a weight that is computed with (2 in bfloat16, 4 in float32). What is kept,
in bytes a parameter (Rajbhandari et al., "ZeRO", 2020, section 3.1; our engine sums gradients up in float32
in stages 2 and 3):

    stage              weights  gradients  master  moments  average
    0 (float32 only)   4        4          -       8        4/R
    1                  b        b          4/R     8/R      4/R
    2                  b        4/R        4/R     8/R      4/R
    3                  b/R      4/R        4/R     8/R      4/R

In stage 3 small parameters (norms, biases) stay whole on every rank besides; they count as weights, as does
the second copy that c = zero_hpz_partition_size ranks share: b/c more. What is not trained (the backbone
under adapters) has weights and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from models.text_to_image import TextToImageConfig
from models.weights import expected_specs
from models.weights.layout import LLM
from trainer.adapters import adapter_sizes
from trainer.costs import parameter_counts
from trainer.model_recipe import LoraSection
from trainer.recipe import ZeroSection

Precision = Literal["float32", "bfloat16"]
BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}

# DeepSpeed's own, where the recipe leaves them open.
PERSISTENCE_THRESHOLD = 100_000
BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000
SUB_GROUP = 1_000_000_000

FIRST_LAYER = "llm.model.layers.0."


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        sizes: elements of each tensor that is trained.
        in_layer: elements of all tensors of one layer of the backbone.
        by_part: elements of the "embedding", the "output" embedding, the rest of the "backbone", the
            "adapters", the "projector" and the "head".
        frozen: elements of each tensor that is not trained.
    """

    sizes: tuple[int, ...]
    in_layer: int
    by_part: dict[str, int]
    frozen: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Of those that are trained."""
        return sum(self.sizes)

    @property
    def all(self) -> int:
        """Of all, trained or not."""
        return self.total + sum(self.frozen)

    def padded(self, ranks: int) -> int:
        """Elements on a rank where each trained tensor is cut into equal parts, the last ones padded."""
        return sum(math.ceil(size / ranks) for size in self.sizes)


def count_parameters(config: TextToImageConfig, lora: LoraSection | None = None) -> Parameters:
    """Exactly, from the shapes of the model's tensors."""
    trained: list[int] = []
    frozen: list[int] = []
    in_layer = 0
    for name, spec in expected_specs(config).items():
        size, adapter = math.prod(spec.shape), adapter_sizes(name, spec.shape, lora)
        is_frozen = lora is not None and name.startswith(LLM)
        (frozen if is_frozen else trained).append(size)
        trained += adapter
        if name.startswith(FIRST_LAYER):
            in_layer += size + sum(adapter)
    return Parameters(tuple(trained), in_layer, parameter_counts(config, lora), tuple(frozen))


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one GPU; what is offloaded is in `host` or `nvme` instead."""

    weights: int
    gradients: int
    master: int
    moments: int
    average: int
    host: int = 0
    nvme: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.master + self.moments + self.average


def state_bytes(
    parameters: Parameters, zero: ZeroSection, precision: Precision, ranks: int, average: bool
) -> StateBytes:
    """What one rank keeps between steps.

    Args:
        average: whether a moving average of the weights is kept.
    """
    total, width = parameters.total, BYTES[precision]
    share = parameters.padded(ranks) if zero.stage == 3 else math.ceil(total / ranks)
    ema = 4 * math.ceil(total / ranks) if average else 0
    if zero.stage == 0:
        return StateBytes(4 * parameters.all, gradients=4 * total, master=0, moments=8 * total, average=ema)
    gradients = 4 * share if zero.stage > 1 else width * total
    if zero.stage == 3:
        frozen = sum(math.ceil(size / ranks) for size in parameters.frozen)
        copy = _second_copy(parameters, zero, ranks)
        weights = width * (share + frozen + copy + _persistent(parameters, zero, ranks))
    else:
        weights = width * parameters.all
    state = StateBytes(weights, gradients, master=4 * share, moments=8 * share, average=ema)
    if zero.offload_optimizer:
        state = _offload_optimizer(state, parameters, zero, width, share)
    return _offload_weights(state, zero.offload_param.device) if zero.offload_param else state


def step_bytes(parameters: Parameters, zero: ZeroSection, ranks: int) -> int:
    """Bytes that the optimizer's step needs for a moment: its share's gradient, two temporaries of Adam's.

    Activations are gone by then, so of the two peaks only the larger one counts.
    """
    if zero.offload_optimizer:
        return 0
    share = math.ceil(parameters.total / ranks) if zero.stage else parameters.total
    return 12 * (min(share, SUB_GROUP) if zero.stage == 3 else share)


def _persistent(parameters: Parameters, zero: ZeroSection, ranks: int) -> int:
    threshold = zero.stage3_param_persistence_threshold
    threshold = PERSISTENCE_THRESHOLD if threshold is None else threshold
    sizes = parameters.sizes + parameters.frozen
    return sum(size for size in sizes if size < threshold) if ranks > 1 else 0


def _second_copy(parameters: Parameters, zero: ZeroSection, ranks: int) -> int:
    """Elements on a rank of the copy that `zero_hpz_partition_size` ranks share."""
    if zero.copy_size == 1 or ranks == 1:
        return 0
    sharing = min(zero.copy_size, ranks)
    return sum(math.ceil(size / sharing) for size in parameters.sizes + parameters.frozen)


def _offload_optimizer(
    state: StateBytes, parameters: Parameters, zero: ZeroSection, width: int, share: int
) -> StateBytes:
    """Masters and moments are elsewhere, and what DeepSpeed needs for that.

    The step reads a float32 gradient in host memory, wherever masters and moments are; the average is beside.
    Before it, stage 3 sums micro-steps up there too, stage 2 on the device (of float32 weights, in host
    memory), and stage 1 has the ordinary gradients. Stages 1 and 2 send gradients through a buffer of the
    largest one on either side, and new weights through one of the rank's share.
    """
    assert zero.offload_optimizer is not None
    way = width * max(parameters.sizes)
    host, device = 4 * share + state.average, state.gradients + way
    if zero.stage < 3:
        host += way + width * share
    else:
        host, device = host + 4 * share, 0
    if zero.stage == 2 and width == 4:
        host, device = host + 4 * share + way, way
    moved = state.master + state.moments
    state = replace(state, gradients=device, master=0, moments=0, average=0)
    if zero.offload_optimizer.device == "nvme":
        return replace(state, host=host, nvme=moved)
    return replace(state, host=host + moved)


def _offload_weights(state: StateBytes, device: Literal["cpu", "nvme"]) -> StateBytes:
    if device == "nvme":
        return replace(state, weights=0, nvme=state.nvme + state.weights)
    return replace(state, weights=0, host=state.host + state.weights)


def saved_bytes(parameters: Parameters, average: bool) -> int:
    """Of a checkpoint: float32 weights and both moments, and the average where there is one."""
    return (16 if average else 12) * parameters.total


def save_copy_bytes(parameters: Parameters, zero: ZeroSection, ranks: int, average: bool) -> int:
    """Host memory of a rank for the copy that is written while training goes on.

    Of an optimizer on a disk none is made: training waits.
    """
    if zero.offload_optimizer and zero.offload_optimizer.device == "nvme":
        return 0
    return math.ceil(saved_bytes(parameters, average) / ranks)


def communication_bytes(parameters: Parameters, zero: ZeroSection, precision: Precision, ranks: int) -> int:
    """Bytes of weights that are gathered, and of gradients on their way, at the most.

    Stage 3 gathers weights ahead of use and keeps them up to `stage3_max_live_parameters` elements; gradients
    are collected in a bucket, reduced from a copy of it, and one larger than the bucket goes by itself.
    """
    if ranks == 1 and zero.stage == 0:
        return 0
    width, total, largest = BYTES[precision], parameters.total, max(parameters.sizes)
    bucket = min(zero.reduce_bucket_size or BUCKET, total)
    # Below stage 3 overlap_comm adds a second bucket, to be filled while the first is being reduced.
    buckets = 2 if zero.stage < 3 and zero.overlap_comm else 1
    reducing = width * (bucket * buckets + max(bucket, largest))
    if zero.stage < 3:
        return reducing
    prefetch = zero.stage3_prefetch_bucket_size
    prefetch = PREFETCH_BUCKET if prefetch is None else prefetch
    ahead = max(largest, *parameters.frozen, parameters.in_layer) + prefetch
    live = max(ahead, zero.stage3_max_live_parameters or MAX_LIVE)
    return reducing + width * min(live, parameters.all)
