"""What the page shows, read from a finished dataset: whole side index, but only a spread of records.

Lengths and buckets are counted over all samples (3 bytes each). Pictures and scores are in the records: of
those a few runs of neighbours, spread evenly over each class, are read, so that a remote dataset costs a
few shards and not all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.class_index import ClassIndex
from data_pipeline.latents import LatentDataset
from data_pipeline.metadata.filtering import read_funnel
from data_pipeline.metadata.funnel import Funnel
from data_pipeline.recipe_folder import RECORD_NAME, recipe_of_record
from data_pipeline.records import LatentRecord
from data_pipeline.store import open_store
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.errors import DataError, RecipeError

RUNS, RUN_LENGTH = 16, 256  # of neighbouring records in each class, for the scores
CHUNK = 1 << 22


@dataclass(frozen=True)
class ClassLook:
    """One resolution class.

    Attributes:
        resolution: its name.
        buckets: `(height, width)` in pixels -> samples.
        lengths: int64 `[longest + 1]`: captions by tokens.
        shown: records whose pictures are shown.
    """

    resolution: int
    buckets: dict[tuple[int, int], int]
    lengths: NDArray[np.int64]
    shown: list[LatentRecord]


@dataclass(frozen=True)
class Look:
    """A dataset, as far as the page shows it.

    Attributes:
        dataset: its address and manifest.
        classes: by rising resolution.
        scores: name -> values in the records that were read.
        records_read: their number.
        funnel: of the filter that chose the samples; None where there was none.
    """

    dataset: LatentDataset
    classes: list[ClassLook]
    scores: dict[str, NDArray[np.float64]]
    records_read: int
    funnel: Funnel | None


def look_at(dataset: LatentDataset, shown: int, filter_folder: Path | None) -> Look:
    """Read what the page shows.

    Args:
        dataset: finished.
        shown: pictures per class.
        filter_folder: the filter's output; by default the one that the dataset's recipe names.

    Raises:
        DataError: the dataset is damaged, or `filter_folder` has no funnel.
    """
    classes = []
    scores: dict[str, list[float]] = {}
    read = 0
    for section in dataset.manifest.classes:
        index = dataset.classes[section.resolution]
        for number in _runs(index.samples):
            read += 1
            for name, value in dataset.record(section.resolution, number).scores.items():
                if isinstance(value, int | float):
                    scores.setdefault(name, []).append(float(value))
        lengths, by_bucket = _count(index, len(section.buckets))
        buckets = dict(zip(section.buckets, by_bucket.tolist(), strict=True))
        places = np.unique(np.linspace(0, index.samples - 1, min(shown, index.samples)).round().astype(int))
        records = [dataset.record(section.resolution, int(place)) for place in places]
        classes.append(ClassLook(section.resolution, buckets, lengths, records))
    finite = {name: np.array([v for v in values if np.isfinite(v)]) for name, values in scores.items()}
    finite = {name: values for name, values in sorted(finite.items()) if len(values)}
    return Look(dataset, classes, finite, read, _funnel(dataset, filter_folder))


def _runs(samples: int) -> Iterator[int]:
    """Ids of a few runs of neighbours, spread evenly; all of them where there are not many."""
    if samples <= RUNS * RUN_LENGTH:
        yield from range(samples)
        return
    for start in np.linspace(0, samples - RUN_LENGTH, RUNS).astype(int):
        yield from range(start, start + RUN_LENGTH)


def _count(index: ClassIndex, buckets: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths, by_bucket = np.zeros(1 << 16, np.int64), np.zeros(buckets, np.int64)
    for start in range(0, index.samples, CHUNK):
        lengths += np.bincount(index.n_text[start : start + CHUNK], minlength=len(lengths))
        by_bucket += np.bincount(index.bucket[start : start + CHUNK], minlength=buckets)
        index.release()
    longest = int(np.flatnonzero(lengths).max(initial=0))
    return lengths[: longest + 1], by_bucket


def _funnel(dataset: LatentDataset, folder: Path | None) -> Funnel | None:
    if folder is not None:
        try:
            return read_funnel(folder)
        except OSError as error:
            raise DataError(f"{folder} is no output of `bitdance data filter` ({error})") from None
    record = open_store(dataset.folder).read(RECORD_NAME)
    if record is None:
        return None
    keep = recipe_of_record(TokenizeRecipe, record, f"{dataset.folder}/{RECORD_NAME}").keep
    if keep is None or not (Path(keep.rows).parent / "funnel.json").is_file():
        return None
    return read_funnel(Path(keep.rows).parent)


def tokenizer_folder(dataset: LatentDataset, given: Path | None) -> Path:
    """The binary tokenizer that shows the pictures: the recorded one, or `given`, if it has the same weights.

    Raises:
        RecipeError: it is not there, or is another one.
    """
    from models.tokenizer import tokenizer_fingerprint

    recorded = dataset.manifest.tokenizer
    folder = given or Path(recorded.folder)
    fix = "give the folder that made the dataset: --tokenizer FOLDER"
    try:
        fingerprint = tokenizer_fingerprint(folder)
    except (ValueError, OSError) as error:
        raise RecipeError(f"the tokenizer {folder} cannot be read ({error}); {fix}") from None
    if fingerprint != recorded.fingerprint:
        raise RecipeError(
            f"the tokenizer {folder} has the fingerprint {fingerprint[:12]}, the dataset was made by "
            f"{recorded.fingerprint[:12]}; {fix}"
        )
    return folder
