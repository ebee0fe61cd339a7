"""Writes the example data set: img2dataset-style shards and a LAION-Aesthetics-style metadata table.

    DIR/metadata.parquet                            LAION-Aesthetics columns; a row per picture, one dead link
    DIR/shards/00000.tar, .parquet, _stats.json     what img2dataset leaves, two shards

Equal calls give equal bytes: file times and durations are zero.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.metadata.laion_hash import laion_hash
from data_pipeline.sample_photos.catalogue import PHOTOS, REJECTS, Entry
from foundation.errors import UserError
from foundation.files import commit_folder
from foundation.ownership import FolderTaken
from foundation.partials import PARTIAL_SUFFIX, partial_path, sweep_abandoned
from foundation.progress import say

SHARDS = 2
JPEG_QUALITY = 95  # img2dataset's default
BASE_URL = "https://scikit-image.example/data/"  # a name reserved for examples: nothing answers there
DEAD_LINK = Entry("gone.jpg", "A picture whose link is dead.", 6.0, 0.33)


def write_sample(folder: Path) -> None:
    """Write the example under `folder`, whole or not at all; does nothing where it is there already.

    Raises:
        UserError: scikit-image is not installed.
        FolderTaken: `folder` holds something else.
    """
    marker = folder / "metadata.parquet"
    if marker.exists() and (folder / "shards").is_dir():
        say(f"{folder}: the example is there already")
        return
    if folder.exists() and any(folder.iterdir()):
        raise FolderTaken(f"{folder} is not empty and holds no example photographs; name another folder")
    source = photo_folder()
    sweep_abandoned(folder.parent.glob(f".{folder.name}.*{PARTIAL_SUFFIX}"))
    partial = partial_path(folder)
    (partial / "shards").mkdir(parents=True)
    entries = _interleave(PHOTOS, REJECTS)
    _write_metadata(entries, source, partial / "metadata.parquet")
    size = -(-len(entries) // SHARDS)
    for shard in range(SHARDS):
        part = entries[shard * size : (shard + 1) * size]
        _write_shard(shard, part, source, partial / "shards")
    commit_folder(partial, folder)
    say(
        f"{folder}: {len(PHOTOS)} photographs of scikit-image, {len(REJECTS)} pictures for a filter to drop, "
        f"in {SHARDS} shards; captions ours, scores made up"
    )


def photo_folder() -> Path:
    """The data folder inside the installed scikit-image wheel.

    Raises:
        UserError: scikit-image is missing.
    """
    try:
        import skimage
    except ImportError:
        raise UserError(
            "The example photographs are those of scikit-image, which is not installed: "
            "`pip install 'bitdance-trainer[demo]'`"
        ) from None
    return Path(skimage.__file__).parent / "data"


def _interleave(photos: Sequence[Entry], rejects: Sequence[Entry]) -> list[Entry]:
    """Every other entry a reject while there are any, so that each shard has some."""
    mixed: list[Entry] = []
    for place, photo in enumerate(photos):
        mixed.append(photo)
        mixed.extend(rejects[place // 2 : place // 2 + 1] if place % 2 else ())
    return mixed + list(rejects[len(photos) // 2 :])


def _row(entry: Entry) -> dict[str, Any]:
    url = BASE_URL + entry.file
    return {
        "similarity": entry.similarity,
        "punsafe": entry.unsafe,
        "pwatermark": entry.watermark,
        "AESTHETIC_SCORE": entry.aesthetic,
        "hash": laion_hash(pa.array([url]), pa.array([entry.caption]))[0].as_py(),
        "caption": entry.caption,
        "url": url,
    }


def _write_metadata(entries: Sequence[Entry], source: Path, path: Path) -> None:
    from PIL import Image

    rows = []
    for entry in (*entries, DEAD_LINK):
        row = _row(entry)
        width, height = (640, 480) if entry is DEAD_LINK else Image.open(source / entry.file).size
        text = {"URL": row.pop("url"), "TEXT": row.pop("caption")}
        rows.append({**text, "WIDTH": float(width), "HEIGHT": float(height), **row})
    schema = pa.schema(
        [("URL", pa.string()), ("TEXT", pa.string()), ("WIDTH", pa.float64()), ("HEIGHT", pa.float64())]
        + [("similarity", pa.float64())]
        + [(name, pa.float32()) for name in ("punsafe", "pwatermark", "AESTHETIC_SCORE")]
        + [("hash", pa.int64())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _write_shard(shard: int, entries: Sequence[Entry], source: Path, folder: Path) -> None:
    import webdataset

    rows = []
    tar = webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False, mtime=0.0)
    with tar:
        for place, entry in enumerate(entries):
            key = f"{shard:05d}{place:04d}"
            picture, size = _as_jpeg(source / entry.file)
            row = _row(entry) | _download_columns(key, size, picture)
            rows.append(row)
            text = entry.caption.encode()
            tar.write({"__key__": key, "jpg": picture, "json": json.dumps(row).encode(), "txt": text})
    if shard == SHARDS - 1:
        failed = _download_columns(f"{shard:05d}{len(entries):04d}", (None, None), None)
        rows.append(_row(DEAD_LINK) | failed)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    successes = len(entries)
    stats = {
        "count": len(rows),
        "successes": successes,
        "failed_to_download": len(rows) - successes,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": successes}
        | ({"HTTP Error 404: Not Found": 1} if len(rows) > successes else {}),
    }
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def _as_jpeg(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The picture as img2dataset stores it: JPEG, the size kept, grey left grey, alpha on white."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode == "RGBA":
            ground = Image.new("RGBA", image.size, "white")
            picture = Image.alpha_composite(ground, image).convert("RGB")
        else:
            picture = image.copy()
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), picture.size


def _download_columns(key: str, size: tuple[int | None, int | None], picture: bytes | None) -> dict[str, Any]:
    """The columns that img2dataset adds; `picture` None stands for a download that failed."""
    return {
        "key": key,
        "status": "success" if picture else "failed_to_download",
        "error_message": None if picture else "HTTP Error 404: Not Found",
        "width": size[0],
        "height": size[1],
        "original_width": size[0],
        "original_height": size[1],
        "exif": "{}" if picture else None,
        "sha256": hashlib.sha256(picture).hexdigest() if picture else None,
    }
