"""Resolution classes and their aspect buckets: where a picture goes, and how it is cut to fit.

A class is named by its nominal side in pixels and has a list of `(height, width)` buckets. Of a class, a
picture takes the bucket nearest in log aspect; it is resized to cover it (antialiased) and cropped at the
centre.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Placement:
    """Where a picture of a given size goes in one class.

    Attributes:
        bucket: place in the class's list.
        height: of the bucket, in pixels.
        width: of the bucket, in pixels.
        scale: factor from the picture to the bucket; above 1 it is enlarged.
        cropped: share of the resized picture's area that is cut away, in [0, 1).
    """

    bucket: int
    height: int
    width: int
    scale: float
    cropped: float


def nearest_bucket(height: int, width: int, buckets: Sequence[Size]) -> Placement:
    """The bucket with the least |log aspect difference|; the first of those that tie.

    Args:
        height: of the picture, in pixels, at least 1.
        width: of the picture, in pixels, at least 1.
        buckets: `(height, width)` in pixels, at least one.
    """
    aspect = math.log(width / height)
    # Rounded, so that a tie (a picture just between two buckets) does not hang on the last bit of a
    # logarithm.
    distances = [round(abs(math.log(w / h) - aspect), 12) for h, w in buckets]
    place = distances.index(min(distances))
    h, w = buckets[place]
    scale = max(h / height, w / width)
    cropped = 1.0 - (h * w) / (scale * height * scale * width)
    return Placement(place, h, w, scale, max(0.0, cropped))


def fit_to_bucket(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize to cover, antialiased, and crop at the centre: `[height, width, 3]` uint8.

    Scaling and cropping are one step: the centred box of the bucket's aspect is resampled straight to the
    target, so the crop is exact to a fraction of a pixel and nothing is computed that is then cut away.
    """
    scale = max(height / image.height, width / image.width)
    box_height, box_width = height / scale, width / scale
    top, left = (image.height - box_height) / 2, (image.width - box_width) / 2
    # Rounding may put an edge a hair outside of the picture, which Pillow refuses.
    box = (
        max(0.0, left),
        max(0.0, top),
        min(image.width, left + box_width),
        min(image.height, top + box_height),
    )
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=None)
    return np.asarray(resized, dtype=np.uint8)
