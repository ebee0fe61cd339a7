"""Hugging Face parquet: an `image` column of `{bytes, path}` beside other columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.storage import is_remote, remote_files
from foundation.errors import DataError

ROWS_AT_A_TIME = 64  # bounds memory: rows hold whole pictures


def read_table(path: str, section: InputSection) -> Iterator[RawSample | Refused]:
    """The pictures of a parquet file, a row each, keyed by file and row.

    Raises:
        DataError: no parquet, or without the columns.
    """
    table = open_table(path)
    names = table.schema_arrow.names
    if "image" not in names or section.caption_column not in names:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; expected image and {section.caption_column!r} "
            "(input.caption_column)"
        )
    number = 0
    for batch in table.iter_batches(ROWS_AT_A_TIME):
        for row in batch.to_pylist():
            key = f"{path.rpartition('/')[2]}:{number}"
            number += 1
            image, caption = row.pop("image"), row.pop(section.caption_column)
            data = image.get("bytes") if isinstance(image, dict) else None
            if not isinstance(data, bytes):
                yield Refused(key, "its image has no bytes")
            elif len(data) > section.max_member_bytes:
                yield Refused(key, f"over the cap of {section.max_member_bytes} bytes")
            else:
                yield RawSample(key, data, caption if isinstance(caption, str) else None, row)


def open_table(path: str) -> Any:
    """A parquet file, opened; DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if is_remote(path):
            return pq.ParquetFile(path.removeprefix("s3://"), filesystem=remote_files())
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None
