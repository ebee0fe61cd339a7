"""The grid holds every picture where its heading says, and PSNR is what its definition says."""

import math

import numpy as np
import pytest
from PIL import Image

from evaluation.pictures import Row, draw_grid, psnr


def test_grid_shows_each_picture_once_unscaled():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    sizes = [(40, 30), (64, 64), (20, 50), (64, 10)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    grid = np.asarray(draw_grid(["left", "right"], [Row(pictures[:2], "a"), Row(pictures[2:], "b" * 500)]))
    places = {}
    for colour, (width, height) in zip(colours, sizes, strict=True):
        rows, columns = np.nonzero((grid == colour).all(-1))
        assert len(rows) == width * height
        places[colour] = (rows.min(), columns.min())
    assert places[colours[0]][1] < places[colours[1]][1] and places[colours[2]][1] < places[colours[3]][1]
    assert places[colours[1]][0] + 64 <= places[colours[2]][0]


def test_grid_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="rows of 2 pictures"):
        draw_grid(["left", "right"], [Row([Image.new("RGB", (4, 4))], "a")])


def test_psnr_of_a_known_error():
    one = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(one, one) == math.inf
    assert psnr(one, one + 5) == pytest.approx(10 * math.log10(255**2 / 25))
