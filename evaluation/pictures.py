"""Pictures for people: a labelled grid, and the distance between two pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MARGIN = 12
CAPTION_HEIGHT = 22
INK, PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One row of a grid: pictures (uint8 RGB, any sizes) above a line of text."""

    pictures: Sequence[Image.Image]
    caption: str


def draw_grid(headings: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """A table of pictures with a heading above each column and a caption below each row.

    Args:
        headings: one for each column.
        rows: each with as many pictures as there are headings.

    Raises:
        ValueError: no rows, or a row of another length than the headings.
    """
    if not rows or any(len(row.pictures) != len(headings) for row in rows):
        raise ValueError(f"a grid of {len(headings)} columns needs rows of {len(headings)} pictures each")
    font = ImageFont.load_default(size=15)
    widths = [max(row.pictures[i].width for row in rows) for i in range(len(headings))]
    heights = [max(picture.height for picture in row.pictures) for row in rows]
    width = sum(widths) + MARGIN * (len(widths) + 1)
    height = CAPTION_HEIGHT + MARGIN + sum(heights) + len(rows) * (CAPTION_HEIGHT + MARGIN)
    grid = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(grid)
    lefts = [MARGIN + sum(widths[:i]) + MARGIN * i for i in range(len(widths))]
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, MARGIN / 2), heading, INK, font)
    top = CAPTION_HEIGHT + MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for left, column_width, picture in zip(lefts, widths, row.pictures, strict=True):
            grid.paste(picture, (left + (column_width - picture.width) // 2, top))
        draw.text((MARGIN, top + row_height + 2), _fit(row.caption, width - 2 * MARGIN, font), INK, font)
        top += row_height + CAPTION_HEIGHT + MARGIN
    return grid


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text`` cut to ``width`` pixels, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures ``[H, W, 3]``; infinite where they are equal."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
