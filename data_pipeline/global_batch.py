"""What training sees at step s: a pure function of (recipe, dataset, s), whatever the number of ranks.

The global batch has exactly the recipe's number of samples in exactly the recipe's ratio of classes; each
class is an endless shuffled stream; what is drawn for a sample depends on its place in that stream alone.
So there is no loader state to save: to resume is to know s. B samples in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch_recipe import BatchRecipe
from data_pipeline.class_index import ClassIndex
from data_pipeline.class_ratio import ClassRatio
from data_pipeline.keyed_hash import Purpose, derive_key, uniform
from data_pipeline.order import WindowedShuffle
from data_pipeline.packing import Assignment, SampleCost, assign
from data_pipeline.records import LatentRecord
from foundation.errors import Problems, RecipeError
from models.layout import Task, check_grid, document_length, document_targets
from models.layout.tokens import TemplateLengths

_NAMED = 10  # samples named in a message, of those that do not fit
# The cases of a document: (task, whether the user's turn is dropped).
_CASES: tuple[tuple[Task, bool], ...] = (("t2i", False), ("t2i", True), ("i2t", False))


class LatentSource(Protocol):
    """What the plan needs of a dataset; `latents.LatentDataset` is one."""

    @property
    def classes(self) -> Mapping[int, ClassIndex]:
        """Side index by resolution."""

    def record(self, resolution: int, sample_id: int) -> LatentRecord:
        """One record."""


@dataclass(frozen=True)
class SampleRef:
    """One sample of a step, before it is read. See `GlobalBatch` for the fields."""

    resolution: int
    position: int
    sample_id: int
    task: Task
    drop_text: bool
    n_text: int
    h: int
    w: int
    length: int

    @property
    def name(self) -> str:
        """Class and id, as logs name a sample without having read it: "512/1234"."""
        return f"{self.resolution}/{self.sample_id}"


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step as columns, each `[B]`; indexing gives `SampleRef`s.

    Classes stand one after the other, in each the samples by position. int64 unless said otherwise.

    Attributes:
        resolution: class of each sample.
        position: place in the endless stream of its class; what is drawn for the sample is keyed by it.
        sample_id: id in the class.
        case: what is made of it: 0 caption -> picture, 1 the same without caption, 2 picture -> caption.
        n_text: caption tokens.
        h: rows of the token grid.
        w: columns of the token grid.
        length: tokens in a pack.
        vision_targets: vision tokens that a loss is computed on.
        text_targets: text tokens that a loss is computed on.
    """

    resolution: NDArray[np.int64]
    position: NDArray[np.int64]
    sample_id: NDArray[np.int64]
    case: NDArray[np.int64]
    n_text: NDArray[np.int64]
    h: NDArray[np.int64]
    w: NDArray[np.int64]
    length: NDArray[np.int64]
    vision_targets: NDArray[np.int64]
    text_targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.resolution)

    def __getitem__(self, index: int) -> SampleRef:
        task, drop_text = _CASES[self.case[index]]
        return SampleRef(
            resolution=int(self.resolution[index]),
            position=int(self.position[index]),
            sample_id=int(self.sample_id[index]),
            task=task,
            drop_text=drop_text,
            n_text=int(self.n_text[index]),
            h=int(self.h[index]),
            w=int(self.w[index]),
            length=int(self.length[index]),
        )

    def __iter__(self) -> Iterator[SampleRef]:
        return (self[index] for index in range(len(self)))


class BatchPlan:
    """Which samples stand in which step, and how a step is cut for the ranks. Safe to share among threads."""

    def __init__(
        self,
        recipe: BatchRecipe,
        dataset: LatentSource,
        p: int,
        template: TemplateLengths,
        ranks: int,
        cost: SampleCost,
    ):
        """
        Args:
            recipe: how steps are made of samples.
            dataset: the side indexes; records are read only to name samples that do not fit.
            p: side of a patch in tokens.
            template: lengths of the chat template's parts, `SequenceTokens.template`.
            ranks: R. Has no influence on what is in a step.
            cost: what is to be even over the packs.

        Raises:
            RecipeError: with everything that is wrong: a class of the ratio is missing or empty, a grid
                cannot be cut into patches, samples are longer than `max_tokens` (by key), or a batch of the
                longest samples could not be cut into packs for R ranks.
        """
        self.recipe, self.dataset, self.p, self.ranks = recipe, dataset, p, ranks
        self._cost = cost
        self._ratio = ClassRatio(recipe.ratio)
        problems = Problems()
        self._streams: dict[int, _ClassStream] = {}
        for resolution in self._ratio.classes:
            index = dataset.classes.get(resolution)
            if index is None or not index.samples:
                have = (
                    ", ".join(str(name) for name in dataset.classes if dataset.classes[name].samples)
                    or "none"
                )
                problems.add(
                    f"data.ratio.{resolution}", "the dataset has no samples of this class", f"it has {have}"
                )
            elif not _bad_grids(index, p, problems):
                self._streams[resolution] = _ClassStream(index, recipe, p, template)
                _check_lengths(self._streams[resolution], dataset, recipe.max_tokens, problems)
        if not problems.lines:
            self._check_ranks(problems)
        problems.raise_if_any(RecipeError, "The dataset cannot be trained on by this recipe")

    @property
    def resolutions(self) -> list[int]:
        """The classes that the ratio names with a positive weight."""
        return self._ratio.classes

    def step(self, number: int) -> GlobalBatch:
        """The samples of step `number`, from 0 on; any step costs the same."""
        size = self.recipe.global_batch_size
        before = self._ratio.counts_before(number * size)
        after = self._ratio.counts_before((number + 1) * size)
        parts = [stream.samples(before[name], after[name]) for name, stream in self._streams.items()]
        return GlobalBatch(
            **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(GlobalBatch)}
        )

    def assign(self, batch: GlobalBatch) -> Assignment:
        """Cut a step into packs, the same on every rank."""
        costs = self._cost.of(batch.length, batch.vision_targets, batch.text_targets)
        return assign(batch.length, costs, self.ranks, self.recipe.max_tokens)

    def _check_ranks(self, problems: Problems) -> None:
        """Refuse what could fail at some step: a batch of the longest samples that cannot be cut."""
        size = self.recipe.global_batch_size
        share = self._ratio.counts_before(size)
        longest = [
            np.full(share[name] + 1, stream.longest, np.int64) for name, stream in self._streams.items()
        ]
        lengths = np.sort(np.concatenate(longest))[::-1][:size]
        try:
            assign(lengths, lengths, self.ranks, self.recipe.max_tokens)
        except ValueError as error:
            problems.add("data.global_batch_size", f"not every step could be cut: {error}")


class _ClassStream:
    """One class: its order, and the lengths of its documents by (case, bucket)."""

    def __init__(self, index: ClassIndex, recipe: BatchRecipe, p: int, template: TemplateLengths):
        self.index, self._recipe = index, recipe
        self._shuffle = WindowedShuffle(index.shard_sizes, recipe.window, recipe.seed, index.resolution)
        grids = index.grids.tolist()
        self._per_caption_token = np.zeros(len(_CASES), np.int64)
        self._length = np.zeros((len(_CASES), len(grids)), np.int64)  # without the caption
        self._vision_targets = np.zeros_like(self._length)
        self._text_targets = np.zeros_like(self._length)  # without the caption
        for place in np.ndindex(self._length.shape):
            (h, w), (task, drop_text) = grids[place[1]], _CASES[place[0]]
            # Each caption token makes a document longer by one token, or by none: two lengths tell all.
            one, two = (document_length(n, h, w, p, task, drop_text, template) for n in (1, 2))
            vision, text = document_targets(1, h, w, task, drop_text)
            self._per_caption_token[place[0]] = two - one
            self._length[place] = one - (two - one)
            self._vision_targets[place], self._text_targets[place] = vision, text - (two - one)
        possible = [0, 1] + [2] * (recipe.image_to_caption > 0)
        self.longest_without_caption = self._length[possible].max(axis=0)  # [buckets]
        self.longest = int(self.longest_without_caption.max()) + index.longest_caption()

    def samples(self, begin: int, end: int) -> GlobalBatch:
        """The samples at positions begin to end - 1 of the stream."""
        position = np.arange(begin, end)
        sample_id = self._shuffle.sample_ids(position)
        bucket = np.asarray(self.index.bucket)[sample_id]
        n_text = np.asarray(self.index.n_text)[sample_id].astype(np.int64)
        self.index.release()
        case = self._cases(position, n_text)
        caption = self._per_caption_token[case] * n_text
        return GlobalBatch(
            resolution=np.full(len(position), self.index.resolution),
            position=position,
            sample_id=sample_id,
            case=case,
            n_text=n_text,
            h=self.index.grids[bucket, 0],
            w=self.index.grids[bucket, 1],
            length=self._length[case, bucket] + caption,
            vision_targets=self._vision_targets[case, bucket],
            text_targets=self._text_targets[case, bucket] + caption,
        )

    def _cases(self, position: NDArray[np.int64], n_text: NDArray[np.int64]) -> NDArray[np.int64]:
        """What is made of each sample; one without a caption is always an unconditional picture."""
        seed, stream = self._recipe.seed, self.index.resolution
        reads_picture = (
            uniform(derive_key(seed, stream, Purpose.TASK, position)) < self._recipe.image_to_caption
        )
        drops = uniform(derive_key(seed, stream, Purpose.DROP_TEXT, position)) < self._recipe.text_drop
        return np.where(n_text == 0, 1, np.where(reads_picture, 2, np.where(drops, 1, 0)))


def _bad_grids(index: ClassIndex, p: int, problems: Problems) -> bool:
    """Note the grids that p x p patches do not tile; whether there are any."""
    before = len(problems.lines)
    for h, w in index.grids.tolist():
        try:
            check_grid(h, w, p)
        except ValueError as error:
            problems.add(f"class {index.resolution}", str(error))
    return len(problems.lines) > before


def _check_lengths(stream: _ClassStream, dataset: LatentSource, max_tokens: int, problems: Problems) -> None:
    """Note the samples that no pack can hold, the first of them by key."""
    if stream.longest <= max_tokens:
        return
    resolution = stream.index.resolution
    count, first = stream.index.longer_than(max_tokens - stream.longest_without_caption, _NAMED)
    for sample_id in first:
        record = dataset.record(resolution, sample_id)
        problems.add(
            f"{resolution}/{sample_id}",
            f"the sample {record.key!r} ({record.h}x{record.w} tokens, {record.n_text} of caption) does not "
            f"fit into data.max_tokens = {max_tokens}",
            f"the longest of its class takes up to {stream.longest}",
        )
    if count > len(first):
        problems.add(
            f"class {resolution}", f"{count - len(first)} more samples do not fit", "raise data.max_tokens"
        )
