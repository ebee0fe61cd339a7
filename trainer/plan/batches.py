"""Packs as training will cut them, from the dataset's side index, or from an assumed mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.class_index import ClassIndex
from data_pipeline.global_batch import BatchPlan, GlobalBatch, LatentSource
from data_pipeline.manifest import MANIFEST_NAME
from data_pipeline.packing import Assignment, SampleCost
from data_pipeline.records import LatentRecord, packed_size
from models.layout import PUBLISHED_SIZES, TemplateLengths
from trainer.costs import BACKWARD_AND_FORWARD
from trainer.plan.activations import PackShape
from trainer.recipe import DataSection

CAPTION_MEDIAN, CAPTION_SPREAD, CAPTION_LONGEST = 48, 0.9, 512
"""Of assumed captions, in tokens: log-normal (mean 72), cut at the longest."""
ASSUMED_SAMPLES, ASSUMED_SHARD = 20_000, 1_000
STEPS_LOOKED_AT = 3


@dataclass(frozen=True)
class BatchFigures:
    """What steps are made of: means over a few steps of the run.

    Attributes:
        micro_steps: K.
        utilization: tokens over the places for tokens that all packs have.
        imbalance: cost of the heaviest pack over the mean.
        tokens: of a step, over all ranks.
        flops: of a step, forward and backward, without what activation checkpointing computes again.
        bits_bytes: of the latents of a step's pictures.
        longest: tokens of the longest sample.
        packs: the packs that could need most memory: that of most tokens, and that of most text.
    """

    micro_steps: float
    utilization: float
    imbalance: float
    tokens: float
    flops: float
    bits_bytes: float
    longest: int
    packs: tuple[PackShape, ...]


class AssumedDataset:
    """Stands for a dataset that does not exist yet: its classes, grids and caption lengths are made up.

    Classes with published sizes have those, in equal shares; others are square.
    """

    def __init__(self, resolutions: list[int], downsample: int):
        self.classes: Mapping[int, ClassIndex] = {r: _assumed_class(r, downsample) for r in resolutions}

    def record(self, resolution: int, sample_id: int) -> LatentRecord:
        """A record without bits, by which an assumed sample can be named."""
        index = self.classes[resolution]
        h, w = index.grids[index.bucket[sample_id]].tolist()
        return LatentRecord(b"", h, w, "", int(index.n_text[sample_id]), f"assumed sample {sample_id}")


def open_dataset(section: DataSection, downsample: int, assumptions: list[str]) -> LatentSource:
    """The recipe's dataset, or one that stands for it, which is then said in ``assumptions``."""
    if "://" in section.latents or (Path(section.latents) / MANIFEST_NAME).exists():
        from data_pipeline.latents import LatentDataset

        return LatentDataset(section.latents)
    assumptions.append(
        f"{section.latents} is not here: captions have {CAPTION_MEDIAN} tokens in the median, log-normal, "
        f"at most {CAPTION_LONGEST}; pictures take the published sizes of their class alike"
    )
    return AssumedDataset([r for r, weight in section.ratio.items() if weight], downsample)


def batch_figures(
    section: DataSection,
    dataset: LatentSource,
    p: int,
    bits: int,
    ranks: int,
    steps: int,
    cost: SampleCost,
    template: TemplateLengths,
) -> BatchFigures:
    """Pack some steps of the run and see.

    Args:
        bits: C, of a token.
        steps: of the whole run, over which those looked at are spread.
        cost: FLOPs of samples.

    Raises:
        RecipeError: the batch cannot be made from this dataset, or cannot be packed for so many ranks.
    """
    plan = BatchPlan(section, dataset, p, template, ranks, cost)
    batches = [plan.step(number * steps // STEPS_LOOKED_AT) for number in range(STEPS_LOOKED_AT)]
    assignments = [plan.assign(batch) for batch in batches]
    shapes = [shape for pair in zip(batches, assignments, strict=True) for shape in _pack_shapes(*pair)]
    return BatchFigures(
        micro_steps=float(np.mean([a.micro_steps for a in assignments])),
        utilization=float(np.mean([a.utilization for a in assignments])),
        imbalance=float(np.mean([a.imbalance for a in assignments])),
        tokens=float(np.mean([batch.length.sum() for batch in batches])),
        flops=float(np.mean([_flops(batch, cost) for batch in batches])),
        bits_bytes=float(
            np.mean([packed_size(1, int((batch.h * batch.w).sum()), bits) for batch in batches])
        ),
        longest=max(int(batch.length.max()) for batch in batches),
        packs=(
            max(shapes, key=lambda s: (s.tokens, s.vision_targets)),
            max(shapes, key=lambda s: (s.text_targets, s.tokens)),
        ),
    )


def _flops(batch: GlobalBatch, cost: SampleCost) -> float:
    # The cost is in thousandths of what a token costs.
    forward = cost.of(batch.length, batch.vision_targets, batch.text_targets).sum() * cost.per_token / 1000
    return BACKWARD_AND_FORWARD * float(forward)


def _pack_shapes(batch: GlobalBatch, assignment: Assignment) -> list[PackShape]:
    columns = (batch.length, batch.vision_targets, batch.text_targets)
    return [
        PackShape(*(int(column[pack].sum()) for column in columns))
        for rank in assignment.packs
        for pack in rank
    ]


def _assumed_class(resolution: int, downsample: int) -> ClassIndex:
    sizes = PUBLISHED_SIZES.get(resolution, ((resolution, resolution),))
    draws = np.random.default_rng(resolution)
    captions = draws.lognormal(np.log(CAPTION_MEDIAN), CAPTION_SPREAD, ASSUMED_SAMPLES)
    return ClassIndex(
        resolution=resolution,
        grids=np.array(sizes, np.int64) // downsample,
        shard_sizes=np.full(ASSUMED_SAMPLES // ASSUMED_SHARD, ASSUMED_SHARD),
        n_text=captions.clip(1, CAPTION_LONGEST).astype(np.uint16),
        bucket=draws.integers(0, len(sizes), ASSUMED_SAMPLES).astype(np.uint8),
        dropped=np.empty(0, np.int64),
    )
