"""One rank's part of each step, prepared by threads while the step before is computed.

Which samples a step has, and how it is cut, is the plan's (`global_batch.py`); here they are read, drawn
for and packed. A step can be asked for in any order: steps that follow one another are prefetched, a jump
costs one wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from data_pipeline.collate import EncodeCaption, collate
from data_pipeline.global_batch import BatchPlan, GlobalBatch
from data_pipeline.packing import Assignment
from data_pipeline.sample_randomness import SampleDraws
from models.head import HeadConfig
from models.layout import PackedBatch, SequenceTokens, pack


@dataclass(frozen=True)
class StepCounts:
    """Sizes of a whole step, over all ranks; known to each rank without communication.

    A loss is a sum over a rank's tokens divided by these counts, so that a gradient does not depend on how
    the step was cut.

    Attributes:
        samples: B.
        tokens: packed tokens.
        text_targets: caption tokens that a loss is computed on.
        vision_targets: vision tokens that a loss is computed on (N*P over all packs).
        vision_targets_by_resolution: the same for each class of the ratio; zero where the step has none.
    """

    samples: int
    tokens: int
    text_targets: int
    vision_targets: int
    vision_targets_by_resolution: dict[int, int]


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one step.

    Attributes:
        step: its number.
        micro_batches: K packs, K being the same on all ranks.
        counts: sizes of the global batch.
        resolutions: for each pack int64 `[samples]`, the class of each of its samples: that of its patches is
            `resolutions[k][micro_batches[k].patch_sample]`.
        names: for each pack the class and id of its samples ("512/1234"), for logs.
        assignment: how the whole step was cut: micro-steps, imbalance, utilization.
    """

    step: int
    micro_batches: list[PackedBatch]
    counts: StepCounts
    resolutions: list[Tensor]
    names: list[list[str]]
    assignment: Assignment


class StepLoader:
    """Prepares the steps of one rank. Close it, or use it as a context."""

    def __init__(
        self,
        plan: BatchPlan,
        encode: EncodeCaption,
        tokens: SequenceTokens,
        head: HeadConfig,
        rank: int,
        prefetch: int = 2,
        threads: int = 2,
    ):
        """
        Args:
            plan: the same on all ranks.
            encode: caption -> token ids, by the text tokenizer that the dataset was counted with.
            tokens: of the sequence layout.
            head: tells C, P and the density of t.
            rank: in `[0, plan.ranks)`.
            prefetch: steps that are prepared ahead, at least 1.
            threads: that prepare them, one step each.

        Raises:
            ValueError: `head.diff_batch_mul` is not 1.
        """
        assert 0 <= rank < plan.ranks and prefetch >= 1 and threads >= 1
        assert head.parallel_num == plan.p**2
        self._plan, self._encode, self._tokens, self._head = plan, encode, tokens, head
        self._draws = SampleDraws(plan.recipe.seed, plan.recipe.bit_flip, head)
        self._rank, self._prefetch = rank, prefetch
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="step-loader")
        self._coming: dict[int, Future[StepBatch]] = {}

    def step(self, number: int) -> StepBatch:
        """This rank's part of a step, the same however the step was reached; starts on those that follow.

        Raises:
            DataError: a record cannot be read, or is not what the side index says; names the sample.
        """
        wanted = range(number, number + self._prefetch + 1)
        for other in [other for other in self._coming if other not in wanted]:
            self._coming.pop(other).cancel()
        for other in wanted:
            if other not in self._coming:
                self._coming[other] = self._threads.submit(self._prepare, other)
        return self._coming.pop(number).result()

    def steps(self, first: int = 0) -> Iterator[StepBatch]:
        """The steps from `first` on, without end."""
        while True:
            yield self.step(first)
            first += 1

    def close(self) -> None:
        """Stop preparing; waits for what has begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, number: int) -> StepBatch:
        batch = self._plan.step(number)
        assignment = self._plan.assign(batch)
        mine = assignment.packs[self._rank]
        return StepBatch(
            step=number,
            micro_batches=[self._pack(batch, indices.tolist()) for indices in mine],
            counts=_counts(batch, self._plan.resolutions),
            resolutions=[torch.from_numpy(batch.resolution[indices]) for indices in mine],
            names=[[batch[index].name for index in indices.tolist()] for indices in mine],
            assignment=assignment,
        )

    def _pack(self, batch: GlobalBatch, indices: list[int]) -> PackedBatch:
        samples = []
        for index in indices:
            ref = batch[index]
            record = self._plan.dataset.record(ref.resolution, ref.sample_id)
            samples.append(collate(ref, record, self._encode, self._draws, self._head.ch_target))
        return pack(samples, self._tokens, self._plan.p)


def _counts(batch: GlobalBatch, resolutions: list[int]) -> StepCounts:
    by_resolution = {name: int(batch.vision_targets[batch.resolution == name].sum()) for name in resolutions}
    return StepCounts(
        samples=len(batch),
        tokens=int(batch.length.sum()),
        text_targets=int(batch.text_targets.sum()),
        vision_targets=sum(by_resolution.values()),
        vision_targets_by_resolution=by_resolution,
    )
