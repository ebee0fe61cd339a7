"""Buckets: the nearest in log aspect, covering, centred, nothing stretched."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.buckets import fit_to_bucket, nearest_bucket

BUCKETS = [(256, 256), (128, 256), (256, 128), (192, 256)]


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_nearest_in_log_aspect_and_covering(height, width):
    placement = nearest_bucket(height, width, BUCKETS)
    distances = [abs(math.log((w * height) / (h * width))) for h, w in BUCKETS]
    assert distances[placement.bucket] <= min(distances) + 1e-9
    # Covers: no side falls short, and one fits exactly.
    tall, wide = placement.scale * height, placement.scale * width
    assert tall >= placement.height - 1e-6
    assert wide >= placement.width - 1e-6
    assert math.isclose(tall, placement.height) or math.isclose(wide, placement.width)
    assert math.isclose(
        placement.cropped, 1 - placement.height * placement.width / (tall * wide), abs_tol=1e-9
    )


def test_a_tie_goes_to_the_first():
    # Between 1:1 and 2:1 the middle in log aspect is sqrt(2); 1:1 stands first.
    assert nearest_bucket(1_000_000, 1_414_214, [(1, 1), (1, 2)]).bucket == 1
    assert nearest_bucket(1_000_000, 1_414_213, [(1, 1), (1, 2)]).bucket == 0
    assert nearest_bucket(2, 4, [(2, 2), (2, 8)]).bucket == 0


def test_the_crop_is_centred():
    # A wide picture, red | green | blue in equal thirds: the centred square of it is green with even margins.
    columns = np.repeat([[255, 0, 0], [0, 255, 0], [0, 0, 255]], 100, axis=0).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(columns, (150, 300, 3)).copy())
    cut = fit_to_bucket(image, 60, 60)
    assert cut.shape == (60, 60, 3)
    assert cut.dtype == np.uint8
    red, blue = (cut[..., 0] > 128).sum(), (cut[..., 2] > 128).sum()
    assert red == blue == 60 * 10


def test_agrees_with_resize_then_crop():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).resize(
        (400, 240), Image.Resampling.BICUBIC
    )
    cut = fit_to_bucket(smooth, 96, 96)
    whole = smooth.resize((160, 96), Image.Resampling.LANCZOS)
    plain = np.asarray(whole.crop((32, 0, 128, 96)))
    # Away from the border (where the box sees no pixels beyond it) the two are the same picture.
    assert np.abs(cut[:, 6:-6].astype(int) - plain[:, 6:-6]).max() <= 2


def test_shrinking_is_antialiased():
    # A checkerboard of single pixels is grey from afar; without antialiasing it would be moire.
    board = ((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)
    cut = fit_to_bucket(Image.fromarray(board).convert("RGB"), 64, 64)
    assert np.abs(cut.astype(int) - 127).max() <= 3
