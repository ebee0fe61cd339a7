"""Hugging Face parquet: an `image` column of `{bytes, path}` beside other columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.storage import fails_for_a_while, is_remote, reaching, remote_files
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
    batches = table.iter_batches(ROWS_AT_A_TIME)
    while (rows := _next_rows(batches, path)) is not None:
        for row in rows:
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


def _next_rows(batches: Iterator[Any], path: str) -> list[dict[str, Any]] | None:
    """The rows of the next batch; None at the end."""
    import pyarrow as pa

    try:
        with reaching(path):
            batch = next(batches, None)
        return None if batch is None else list(batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if fails_for_a_while(error):
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged, or holds text that is not UTF-8 ({reason})") from None


def open_table(path: str) -> Any:
    """A parquet file, opened; DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if is_remote(path):
            with reaching(path):
                # Opened here, for pyarrow takes a store that lets nobody in for one without the file.
                return pq.ParquetFile(remote_files().open(path, "rb"))
        return pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        if fails_for_a_while(error):
            raise
        raise DataError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]})") from None
