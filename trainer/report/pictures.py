"""Pictures sampled during a run, small and embedded: one row per step, one column per prompt."""

from __future__ import annotations

import html
import re
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from foundation.html_page import embedded_picture

MOST_ROWS = 8
LARGEST_SIDE = 256  # pixels: a page of eight rows of eight stays under 10 MB


def sample_grid(samples: Path) -> str:
    """The pictures in `samples/step-N/*.png` as an HTML table; empty where there are none.

    Rows are at most `MOST_ROWS` steps, spread evenly, the last one among them. In place of a file that is no
    picture stands its name.
    """
    folders = sorted(
        (int(m[1]), path) for path in samples.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))
    )
    shown = _spread(folders)
    columns = sorted({picture.name for _, folder in shown for picture in folder.glob("*.png")})
    if not columns:
        return ""
    head = "".join(f"<th>{html.escape(Path(name).stem)}</th>" for name in columns)
    rows = [
        f"<tr><th>{step}</th>" + "".join(f"<td>{_embedded(folder / name)}</td>" for name in columns) + "</tr>"
        for step, folder in shown
    ]
    return (
        f'<div class="wide"><table class="samples"><tr><th>step</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _spread(folders: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    if len(folders) <= MOST_ROWS:
        return folders
    last = len(folders) - 1
    return [folders[round(i * last / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]


def _embedded(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            small = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return f"{html.escape(path.name)} cannot be read"
    return embedded_picture(small, path.stem, LARGEST_SIDE)
