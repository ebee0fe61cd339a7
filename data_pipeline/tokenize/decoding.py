"""The part of a task that needs no tokenizer: picture bytes to pixels of exact bucket sizes.

Runs in worker processes, which import neither torch nor a tokenizer, or in the task's own process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.buckets import Placement, fit_to_bucket, nearest_bucket
from data_pipeline.images import BadImage, blaming_the_picture, decode_image
from data_pipeline.ingest.samples import RawSample, printable
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.parent_process import die_with

HASH_SIDE = 32  # of the picture that imagehash transforms
# Goes into the markers: hashes by different definitions cannot be compared. Goes with `perceptual_hash`.
HASH_DEFINITION = "imagehash.phash of averages of blocks of min(height, width) // 64 pixels"

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Fitted:
    """A picture cut for one class.

    Attributes:
        class_place: of the class in the recipe.
        placement: its bucket.
        pixels: `[height, width, 3]` uint8.
    """

    class_place: int
    placement: Placement
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """A picture in every class that it goes to, with its perceptual hash; `too_small` where it fits none."""

    fitted: list[Fitted]
    phash: int
    too_small: bool


def decode_sample(sample: RawSample, recipe: TokenizeRecipe) -> Decoded | str:
    """Decode a picture and cut it for its classes; the reason, where it cannot be used."""
    try:
        with blaming_the_picture():
            image = decode_image(sample.image, recipe.pictures.max_pixels, sample.json_exif)
            places = placements(image.height, image.width, recipe)
            fitted = [Fitted(c, p, fit_to_bucket(image, p.height, p.width)) for c, p in places]
            return Decoded(fitted, perceptual_hash(image) if fitted else 0, not fitted)
    except BadImage as error:
        return printable(str(error))


def decode_chosen(chosen: tuple[RawSample, str, dict[str, float]], recipe: TokenizeRecipe) -> Decoded | str:
    """`decode_sample` of a sample that travels with its caption and scores."""
    return decode_sample(chosen[0], recipe)


def placements(height: int, width: int, recipe: TokenizeRecipe) -> list[tuple[int, Placement]]:
    """The classes that a picture of this size goes to, by rising resolution, and where in each."""
    limits = recipe.pictures
    found = []
    for place, section in enumerate(recipe.classes):
        placement = nearest_bucket(height, width, section.buckets)
        if placement.scale <= limits.max_upscale and placement.cropped <= limits.max_cropped:
            found.append((place, placement))
    return found[-1:] if recipe.assign == "largest" else found


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit DCT hash (`imagehash.phash`) as an unsigned integer, first bit highest.

    The library turns the whole picture to grey and resamples that to 32 x 32, both at a cost that grows with
    the picture. Averaging whole blocks first, down to at least twice that, costs a third of it.
    """
    import imagehash

    block = min(image.size) // (2 * HASH_SIDE)
    bits = imagehash.phash(image.reduce(block) if block > 1 else image).hash.reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def decode_pool(workers: int) -> Executor:
    """Processes for `decode_chosen`. They end with the one that calls this, also where that is killed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(),))


def _begin_worker(parent: int) -> None:
    # Each worker holds both ends of the pool's queue, so that its parent's death would go unnoticed there.
    die_with(parent)
    # On Ctrl-C its parent stops it, and only the parent speaks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def ordered_map(
    executor: Executor | None,
    function: Callable[[Given], Made],
    items: Iterable[Given],
    weigh: Callable[[Given], int],
    window: int,
) -> Iterator[tuple[Given, Made]]:
    """Items and their results, in the items' order, read only as far as a window reaches: memory is bounded.

    Args:
        executor: where `function` runs; None runs it here.
        function: from an item to its result.
        items: with those under way no more are held than weigh `window`, and one.
        weigh: the weight of an item, at least 1.
        window: at least 1.
    """
    if executor is None:
        for item in items:
            yield item, function(item)
        return
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    weight = 0
    for item in items:
        waiting.append((item, executor.submit(function, item)))
        weight += weigh(item)
        while weight >= window:
            first, future = waiting.popleft()
            yield first, future.result()
            weight -= weigh(first)
    for first, future in waiting:
        yield first, future.result()
