"""All pictures of the training, decoded once and cut to every class's bucket."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.buckets import Size, fit_to_bucket, nearest_bucket
from data_pipeline.images import BadImage, decode_image
from data_pipeline.ingest.kept import KeptRows, identity, index_folder
from data_pipeline.ingest.refusals import check_refused
from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.shards import list_shards, of_each, read_shard
from foundation.errors import DataError
from foundation.progress import say, track
from trainer.tokenizer_training.recipe import TokenizerRecipe


@dataclass(frozen=True)
class PictureGroup:
    """Pictures of one class and one size, `pixels` uint8 [pictures, height, width, 3]."""

    resolution: int
    size: Size
    pixels: NDArray[np.uint8]


def load_pictures(recipe: TokenizerRecipe) -> list[PictureGroup]:
    """Read every shard and cut each picture for each class; samples that cannot be used are counted and told.

    Raises:
        TooManyRefused: more of them than the recipe allows.
        DataError: no usable picture, more than the recipe's memory, or shards that cannot be read.
    """
    cut: dict[tuple[int, Size], list[NDArray[np.uint8]]] = defaultdict(list)
    refused: list[dict[str, str]] = []
    pictures, held, cap = 0, 0, recipe.memory_gigabytes * 1e9
    for sample in _samples(recipe):
        if isinstance(sample, Refused):
            refused.append({"key": sample.key, "reason": sample.reason})
            continue
        try:
            image = decode_image(sample.image, recipe.max_pixels, sample.json_exif)
        except BadImage as error:
            refused.append({"key": sample.key, "reason": str(error)})
            continue
        pictures += 1
        for section in recipe.classes:
            place = nearest_bucket(image.height, image.width, section.buckets)
            pixels = fit_to_bucket(image, place.height, place.width)
            cut[section.resolution, (place.height, place.width)].append(pixels)
            held += pixels.nbytes
        if held > cap:
            raise DataError(
                f"{pictures} pictures at the recipe's sizes take {held / 1e9:.2f} GB, over "
                f"memory_gigabytes = {recipe.memory_gigabytes}: name fewer shards in input.path, or raise it"
            )
    where, considered = ", ".join(recipe.input.path), pictures + len(refused)
    check_refused(where, refused, considered, recipe.max_bad_fraction)
    if refused:
        first = f"{refused[0]['key']}: {refused[0]['reason']}"
        say(f"{len(refused)} of {considered} pictures cannot be used, the first: {first}")
    if not cut:
        raise DataError(f"no usable picture in {where} ({len(refused)} refused)")
    say(f"{pictures} pictures in {len(cut)} sizes")
    return [PictureGroup(side, size, np.stack(cut[side, size])) for side, size in sorted(cut)]


def _samples(recipe: TokenizerRecipe) -> Iterator[RawSample | Refused]:
    """The kept samples of all shards, in the shards' order."""
    kept = KeptRows(recipe.keep.by, index_folder(recipe.keep)) if recipe.keep else None
    shards = track(list_shards(recipe.input), "Reading shards")
    for samples in of_each(shards, lambda shard: list(read_shard(shard, recipe.input))):
        if kept is not None:
            names = [identity(sample, kept.by) for sample in samples if isinstance(sample, RawSample)]
            rows = kept.rows(names)
            samples = [
                sample
                for sample in samples
                if isinstance(sample, Refused) or identity(sample, kept.by) in rows
            ]
        yield from samples


def pictures_hash(groups: list[PictureGroup]) -> str:
    """SHA-256 (hex) of all pixels: a training that goes on must go on with the same pictures."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(f"{group.resolution} {group.pixels.shape}".encode())
        digest.update(group.pixels.tobytes())
    return digest.hexdigest()
