"""An index of the filter's kept rows by one of their keys: a lookup reads what it asks for and little more.

    rows.arrow    key, caption and scores of every row in the table's order: Arrow IPC, not compressed
    starts.npy    int64 [record batches of rows.arrow], the number of the first row of each
    hashes.npy    uint64 [rows with a key], the first 8 bytes of the MD5 of their keys, rising
    places.npy    uint64 [rows with a key], the numbers of their rows

They are memory-mapped, so processes of one host share what they have read. A key is looked for by bisection
in the hashes, and its rows are compared by the key itself: equal hashes cost time and nothing else. The rows
stay in the table's order, and pictures that were downloaded from the table have it, too: a shard's rows then
lie side by side.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.ingest.storage import StoreUnreachable, file_version, is_remote, reaching, remote_files
from data_pipeline.metadata.engine import explaining
from data_pipeline.metadata.schema import SCORES, sql_cast, sql_text
from data_pipeline.npy_stream import NpyStream
from data_pipeline.store import writing_to
from foundation.errors import DataError

ROWS, STARTS, HASHES, PLACES = "rows.arrow", "starts.npy", "hashes.npy", "places.npy"
FILTER_AGAIN = "Remove its folder, and `bitdance data filter` makes it anew"
MEMORY = "2GB"  # of DuckDB, which sorts the hashes on disk where they are more
BATCH_ROWS = 1 << 16
HASH_SQL = "md5_number_upper(key::VARCHAR)"  # the same as `key_hashes`


def key_hashes(keys: Sequence[Any]) -> NDArray[np.uint64]:
    """uint64 [keys]: the first 8 bytes of the MD5 of each key's text in UTF-8, little end first."""
    digests = (hashlib.md5(str(key).encode(), usedforsecurity=False).digest() for key in keys)
    return np.fromiter((int.from_bytes(digest[:8], "little") for digest in digests), np.uint64, len(keys))


class KeyIndex:
    """A built index, opened for lookups.

    Args:
        folder: of the four files.
    """

    def __init__(self, folder: Path):
        self.reader = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        self.starts = np.load(folder / STARTS)
        self.hashes = np.load(folder / HASHES, mmap_mode="r")
        self.places = np.load(folder / PLACES, mmap_mode="r")

    def find(self, keys: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """`(key, caption, *scores)` of every row with one of the keys, in the table's order.

        Args:
            keys: distinct, of the type of the table's column, none of them None.
        """
        wanted = set(keys)
        # Rising, so that neighbouring pages are touched one after the other.
        sought = np.sort(key_hashes(keys))
        first = np.searchsorted(self.hashes, sought, side="left")
        last = np.searchsorted(self.hashes, sought, side="right")
        hits = [self.places[a:b] for a, b in zip(first, last, strict=True) if a < b]
        rows = np.unique(np.concatenate(hits).astype(np.int64)) if hits else np.empty(0, np.int64)
        batches = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(batches):
            inside = rows[batches == number] - self.starts[number]
            found = self.reader.get_batch(int(number)).take(pa.array(inside))
            columns = [column.to_pylist() for column in found.columns]
            yield from (row for row in zip(*columns, strict=True) if row[0] in wanted)


def build_index(table: str, by: str, folder: Path) -> None:
    """Fill an empty folder with the index of a table by one of its columns.

    Memory does not grow with the table; the disk takes what the captions, keys and scores are as plain text
    and float64, and 16 bytes a row.

    Args:
        table: path or `s3://` address of the filter's `kept.parquet`.
        by: one of its identities.
        folder: a local folder.

    Raises:
        DataError: the table is missing, is no parquet, or lacks a column.
        PlaceUnusable: the folder's disk is full.
        StoreUnreachable: the table's store does not answer.
    """
    spill = folder / "spill"
    with writing_to(folder), open_table_query(table, spill) as connection:
        _check_columns(connection, table, by)
        key = sql_cast(by, by)
        scores = ", ".join(f"TRY_CAST({name} AS DOUBLE) AS {name}" for name in SCORES)
        source = f"read_parquet({sql_text(table)}, file_row_number = true)"
        _write_rows(
            connection, f"SELECT {key} AS key, caption::VARCHAR AS caption, {scores} FROM {source}", folder
        )
        keys = f"SELECT {key} AS key, file_row_number AS place FROM {source} WHERE {key} IS NOT NULL"
        _write_hashes(connection, keys, folder)
    shutil.rmtree(spill, ignore_errors=True)


@contextmanager
def open_table_query(table: str, spill: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection of little memory that reads the table; what it raises in the block is explained.

    Args:
        table: path or `s3://` address.
        spill: folder for temporary files, which need not exist.

    Raises:
        DataError: the table is missing or damaged.
        PlaceUnusable: the disk of the temporary files is full.
        StoreUnreachable: the table's store does not answer.
    """
    config: dict[str, Any] = {"memory_limit": MEMORY, "temp_directory": str(spill)}
    bounds = explaining(f"{MEMORY} of memory", str(spill), FILTER_AGAIN)
    with duckdb.connect(config=config) as connection, bounds:
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET enable_progress_bar = false")
        if is_remote(table):
            with reaching(table):
                if not remote_files().exists(table):
                    raise DataError(f"{table} does not exist")
            connection.register_filesystem(remote_files())
        try:
            with reaching(table):
                yield connection
        except (duckdb.IOException, pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if is_remote(table):
                # What DuckDB says may quote a request with its signature.
                raise StoreUnreachable(f"{table} cannot be read any more; the same command goes on") from None
            # Where DuckDB fails while its rows are fetched, its words come as an error of Arrow's.
            raise duckdb.OperationalError(str(error)) from None


def _check_columns(connection: duckdb.DuckDBPyConnection, table: str, by: str) -> None:
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM read_parquet({sql_text(table)})").fetchall()
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{table} cannot be read as the filter's kept rows ({reason}). {FILTER_AGAIN}"
        ) from None
    absent = {by, "caption", *SCORES} - {row[0] for row in described}
    if absent:
        raise DataError(
            f"{table} lacks the columns {', '.join(sorted(absent))}: give the kept.parquet of "
            "`bitdance data filter`"
        )


def _write_rows(connection: duckdb.DuckDBPyConnection, rows: str, folder: Path) -> None:
    # DuckDB keeps the order of a table that is only scanned, whatever the number of its threads.
    batches = connection.sql(rows).to_arrow_reader(BATCH_ROWS)
    starts, length = list[int](), 0
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_file(file, batches.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            starts.append(length)
            length += len(batch)
    np.save(folder / STARTS, np.array(starts, np.int64))


def _write_hashes(connection: duckdb.DuckDBPyConnection, keys: str, folder: Path) -> None:
    hashed = f"SELECT {HASH_SQL} AS hash, place FROM ({keys}) ORDER BY hash, place"
    with NpyStream(folder / HASHES, np.uint64) as hashes, NpyStream(folder / PLACES, np.uint64) as places:
        for batch in connection.sql(hashed).to_arrow_reader(BATCH_ROWS):
            hashes.append(batch["hash"].to_numpy())
            places.append(batch["place"].to_numpy())


def table_version(table: Path) -> str:
    """Twelve hex digits that tell a local parquet file from another: of its content (`storage.file_version`)
    and its footer, which has the size and the bounds of each column of each group of rows.

    Raises:
        DataError: it is no parquet.
    """
    version = file_version(str(table))
    try:
        with open(table, "rb") as file:
            state = os.fstat(file.fileno())
            file.seek(max(0, state.st_size - 8))
            length, mark = int.from_bytes(file.read(4), "little"), file.read(4)
            if mark != b"PAR1" or length + 8 > state.st_size:
                problem = "it is no parquet, or was cut short"
                raise DataError(
                    f"{table} cannot be read as the filter's kept rows ({problem}). {FILTER_AGAIN}"
                )
            file.seek(state.st_size - 8 - length)
            digest = hashlib.sha256(f"{version} ".encode())
            digest.update(file.read(length))
    except FileNotFoundError:
        raise DataError(f"{table} does not exist") from None
    return digest.hexdigest()[:12]


def remote_version(address: str) -> str:
    """Twelve hex digits that tell an object from another: of its address, its size and its entity tag.

    Raises:
        DataError: there is none.
        StoreUnreachable: its store does not answer.
    """
    with reaching(address):
        try:
            found = remote_files(listings_cached=False).info(address)
        except FileNotFoundError:
            raise DataError(f"{address} does not exist") from None
    return hashlib.sha256(f"{address} {found['size']} {found['ETag']}".encode()).hexdigest()[:12]
