"""Photos beside their reconstructions and beside what models generate from their captions.

The share of generated bits that equal the photo's own is 0.5 by chance, and near 1 only where a model has
memorized the photo and everything between its latents and its sampling fits together: the order of tokens,
positions, masks, losses, weights handed from stage to stage. It says nothing about a model that generalizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipeline.buckets import fit_to_bucket
from data_pipeline.images import BadImage, decode_image
from data_pipeline.ingest.samples import RawSample
from data_pipeline.ingest.shards import list_shards, read_shard
from data_pipeline.latents import LatentDataset
from data_pipeline.records import LatentRecord, unpack_bits
from evaluation.generate import PictureGenerator
from evaluation.pictures import Row, draw_grid, psnr
from evaluation.recipes import CompareRecipe
from foundation.errors import DataError, Problems, RecipeError
from foundation.files import atomic_write
from foundation.progress import say, track
from models.tokenizer import load_tokenizer, to_uint8, tokenizer_fingerprint

MAX_PIXELS = 100_000_000  # a photo in the dataset has passed a cap already; this one is against mix-ups

# h, w token grid, C bits per token


@dataclass(frozen=True)
class Original:
    """A sample of the dataset with the photo that it was made from.

    Attributes:
        record: as stored.
        bits: float32 ``[C, h, w]`` of -1/+1, plain raster.
        photo: uint8 ``[H, W, 3]``, cut to the record's bucket.
    """

    record: LatentRecord
    bits: Tensor
    photo: NDArray[np.uint8]


def make_comparison(recipe: CompareRecipe, identity: dict[str, str]) -> None:
    """Write `grid.png` and `comparison.json` into the recipe's output folder.

    Args:
        recipe: what to compare.
        identity: of all that the comparison depends on; `comparison.json` carries it.

    Raises:
        DataError, RecipeError: a folder is missing or doesn't fit the others.
    """
    originals = list(track(read_originals(recipe), "Reading photos", recipe.samples))
    if not originals:
        raise DataError(f"{recipe.latents} has no samples in class {recipe.resolution}")
    reconstructions = reconstruct(recipe.tokenizer, originals)
    columns: dict[str, list[Image.Image]] = {
        "photo": [Image.fromarray(original.photo) for original in originals],
        "tokenizer": [Image.fromarray(picture) for picture in reconstructions],
    }
    agreement: dict[str, list[float]] = {}
    for model in recipe.models:
        columns[model.label], agreement[model.label] = generate_column(
            model.label, model.folder, recipe, originals
        )
    distances = [psnr(o.photo, r) for o, r in zip(originals, reconstructions, strict=True)]
    rows = [
        Row(pictures, original.record.caption)
        for original, *pictures in zip(originals, *columns.values(), strict=True)
    ]
    with atomic_write(recipe.output / "grid.png", "wb") as file:
        draw_grid(list(columns), rows).save(file, format="PNG")
    with atomic_write(recipe.output / "comparison.json") as file:
        json.dump({"identity": identity, **figures(originals, distances, agreement)}, file, indent=1)
    say(f"wrote {recipe.output}/grid.png and comparison.json")


@torch.inference_mode()
def reconstruct(folder: Path, originals: list[Original]) -> list[NDArray[np.uint8]]:
    """What the tokenizer makes of each original's bits: uint8 ``[H, W, 3]``."""
    tokenizer = load_tokenizer(folder).eval()
    return [
        to_uint8(tokenizer.decode(original.bits[None]))[0].permute(1, 2, 0).numpy()
        for original in track(originals, "Reconstructing")
    ]


def generate_column(
    label: str, folder: Path, recipe: CompareRecipe, originals: list[Original]
) -> tuple[list[Image.Image], list[float]]:
    """One picture for each original's caption, and its share of bits that equal the original's."""
    generator = PictureGenerator(folder, recipe.tokenizer)
    downsample = generator.tokenizer.config.downsample
    pictures, agreements = [], []
    for original in track(originals, f"Generating, {label}"):
        height, width = original.record.h * downsample, original.record.w * downsample
        bits = generator.bits(original.record.caption, height, width, recipe.sampling)
        pictures += generator.decode(bits)
        agreements.append((bits[0].cpu() == original.bits).float().mean().item())
    return pictures, agreements


def read_originals(recipe: CompareRecipe) -> Iterator[Original]:
    """The samples of the recipe's class, each with its photo.

    Raises:
        RecipeError: the dataset lacks the class, or another tokenizer made it.
        DataError: photos are missing from the shards, or damaged there.
    """
    dataset = LatentDataset(str(recipe.latents))
    if recipe.resolution not in dataset.classes:
        found = ", ".join(map(str, dataset.classes))
        raise RecipeError(
            f"{recipe.latents} has the classes {found}; the recipe asks for {recipe.resolution}"
        )
    if tokenizer_fingerprint(recipe.tokenizer) != dataset.manifest.tokenizer.fingerprint:
        raise RecipeError(
            f"{recipe.tokenizer} is not the tokenizer that made {recipe.latents}: name that one"
        )
    downsample, channels = dataset.manifest.tokenizer.downsample, dataset.manifest.tokenizer.bits_per_token
    total = len(dataset.classes[recipe.resolution].n_text)
    records = [dataset.record(recipe.resolution, i) for i in range(min(total, recipe.samples or total))]
    photos = read_photos(recipe, {record.key for record in records})
    for record in records:
        bits = torch.from_numpy(unpack_bits(record.bits, record.h, record.w, channels)).float()
        photo = fit_to_bucket(photos[record.key], record.h * downsample, record.w * downsample)
        yield Original(record, bits.T.unflatten(1, (record.h, record.w)), photo)


def read_photos(recipe: CompareRecipe, keys: set[str]) -> dict[str, Image.Image]:
    """Upright RGB picture of each key.

    Raises:
        DataError: all keys that the shards lack or hold no picture for.
    """
    photos: dict[str, Image.Image] = {}
    problems, damaged = Problems(), set()
    for shard in list_shards(recipe.photos):
        for sample in read_shard(shard, recipe.photos):
            if not isinstance(sample, RawSample) or sample.key not in keys:
                continue
            try:
                photos[sample.key] = decode_image(sample.image, MAX_PIXELS, sample.json_exif)
            except BadImage as error:
                damaged.add(sample.key)
                problems.add(f"photo {sample.key!r} in {shard.label}", str(error))
    for key in sorted(keys - photos.keys() - damaged):
        problems.add(", ".join(recipe.photos.path), f"no photo {key!r}, which is in {recipe.latents}")
    problems.raise_if_any(DataError, "Name the shards that these latents were made from, undamaged")
    return photos


def figures(
    originals: list[Original], distances: list[float], agreement: dict[str, list[float]]
) -> dict[str, Any]:
    """What `comparison.json` holds: PSNR in dB and shares of equal bits of all, then of each sample."""
    return {
        "psnr_mean": sum(distances) / len(distances),
        "psnr_lowest": min(distances),
        "bit_agreement": {label: sum(shares) / len(shares) for label, shares in agreement.items()},
        "samples": [
            {
                "key": original.record.key,
                "caption": original.record.caption,
                "psnr": distances[i],
                "bit_agreement": {label: shares[i] for label, shares in agreement.items()},
            }
            for i, original in enumerate(originals)
        ],
    }
