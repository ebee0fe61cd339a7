"""Hugging Face parquet: an `image` column, of `{bytes, path}` or of bytes, beside other columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import CAPTION_BYTES, JSON_BYTES, RawSample, Refused
from data_pipeline.ingest.storage import fails_for_a_while, is_remote, reaching, remote_files
from foundation.errors import DataError

# As the file says itself. A page may be all of its row group, and is unpacked whole: a worker may need three
# times as much. Files that are made for pictures have groups of a hundred or a thousand rows.
ROW_GROUP_BYTES = 2 << 30


def read_table(path: str, section: InputSection) -> Iterator[RawSample | Refused]:
    """The pictures of a parquet file, a row each, keyed by file and row.

    Columns of lists, objects and dates are not read. A cell over its cap never becomes an object of Python's.

    Raises:
        DataError: no parquet, without the columns or with other things in them, or in too large row groups.
    """
    table = open_table(path)
    names = _columns(table.schema_arrow, path, section.caption_column)
    _check_row_groups(table, path, names)
    caps = dict.fromkeys(names, JSON_BYTES)
    caps |= {section.caption_column: CAPTION_BYTES, "image": section.max_member_bytes}
    # Row by row, for a cell of a dictionary may be repeated without end.
    rows = table.iter_batches(1, columns=list(names.values()))
    number = 0
    while (row := _next_row(rows, path)) is not None:
        yield _sample(f"{path.rpartition('/')[2]}:{number}", row, caps, section.caption_column)
        number += 1


def _columns(schema: Any, path: str, caption_column: str) -> dict[str, str]:
    """The columns that are read -> what of them; those of numbers and text, beside the picture."""
    names = schema.names
    if "image" not in names or caption_column not in names:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; expected image and {caption_column!r} "
            "(input.caption_column)"
        )
    kinds = {name: _kind(schema.field(name).type) for name in names}
    image, caption = schema.field("image").type, schema.field(caption_column).type
    inside = str(image).startswith("struct") and image.get_field_index("bytes") >= 0
    if (_kind(image.field("bytes").type) if inside else kinds["image"]) != "bytes":
        raise DataError(f"{path}: its image is {image}; expected binary, or a struct with binary `bytes`")
    if kinds[caption_column] not in ("text", "null"):
        raise DataError(f"{path}: its {caption_column!r} is {caption}; expected text (input.caption_column)")
    plain = {name: name for name, kind in kinds.items() if kind in ("text", "number")}
    return plain | {caption_column: caption_column, "image": "image.bytes" if inside else "image"}


def _kind(type_: Any) -> str:
    """`bytes`, `text`, `number`, `null`, or the type's own name."""
    import pyarrow.types as types

    if types.is_dictionary(type_):
        return _kind(type_.value_type)
    text = (types.is_string, types.is_large_string, types.is_string_view)
    bytes_ = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    number = (types.is_integer, types.is_floating, types.is_decimal)
    kinds = {"text": text, "bytes": bytes_, "number": number, "null": (types.is_null,)}
    return next((name for name, tests in kinds.items() if any(test(type_) for test in tests)), str(type_))


def _check_row_groups(table: Any, path: str, columns: Mapping[str, str]) -> None:
    """DataError where what is read of a row group is above ROW_GROUP_BYTES, unpacked."""
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema in columns.values())
        if size > ROW_GROUP_BYTES:
            raise DataError(
                f"{path}: its row group {number} of {group.num_rows} rows has {size} bytes to be read, over "
                f"{ROW_GROUP_BYTES}; write it anew with smaller ones (row_group_size=100 in pyarrow)"
            )


def _next_row(rows: Iterator[Any], path: str) -> Any:
    """The next row, as a batch of it alone; None at the end."""
    import pyarrow as pa

    try:
        with reaching(path):
            return next(rows, None)
    except (pa.ArrowException, OSError) as error:
        if fails_for_a_while(error):
            raise
        raise DataError(f"{path} is damaged ({str(error).splitlines()[0]})") from None


def _sample(key: str, row: Any, caps: Mapping[str, int], caption_column: str) -> RawSample | Refused:
    import pyarrow as pa

    fields = {}
    for name, cap in caps.items():
        cell = row.column(name)[0]
        if isinstance(cell, pa.StructScalar):
            cell = cell["bytes"] if cell.is_valid else pa.scalar(None)
        if isinstance(cell, pa.DictionaryScalar):
            cell = cell.value
        size = cell.as_buffer().size if isinstance(cell, pa.BinaryScalar) and cell.is_valid else 0
        if size > cap:
            return Refused(key, f"its {name} has {size} bytes, over the cap of {cap}")
        try:
            fields[name] = cell.as_py()
        except UnicodeDecodeError:
            return Refused(key, f"its {name} is not UTF-8")
    image, caption = fields.pop("image"), fields.pop(caption_column)
    return RawSample(key, image, caption, fields) if image else Refused(key, "its image has no bytes")


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
