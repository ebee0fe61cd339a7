"""DuckDB, bounded in memory, reading local files and `s3://` (through s3fs, whose keys never enter SQL)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import duckdb
import numpy as np

from data_pipeline.ingest.storage import StoreUnreachable, file_version, matching_files, remote_files
from data_pipeline.metadata.best_rows import mark_worse
from data_pipeline.metadata.laion_hash import register_laion_hash
from data_pipeline.metadata.recipe import EngineSection, FilterRecipe, JoinSection
from data_pipeline.metadata.rules import ListRule
from data_pipeline.metadata.schema import (
    DIGESTS,
    IDENTITIES,
    FileGroup,
    listed_url,
    sql_cast,
    sql_list,
    sql_name,
    sql_place,
    sql_text,
)
from data_pipeline.store import PlaceUnusable
from foundation.errors import DataError, Problems

# In what DuckDB says when a write fails for want of room, and when it would not even try.
_NO_MEMORY = "Out of Memory"
_FULL_DISK = ("No space left on device", "max_temp_directory_size")


@contextmanager
def open_engine(engine: EngineSection, spill: Path, remote: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection within the recipe's bounds.

    Args:
        engine: the bounds.
        spill: folder for temporary files, which need not exist.
        remote: whether any path is an `s3://` address.

    Raises:
        DataError: in it, memory is not enough, or a file is damaged.
        PlaceUnusable: in it, the disk is full.
        StoreUnreachable: in it, a store does not answer, or does not let us in.
    """
    connection = duckdb.connect(config={"memory_limit": engine.memory, "temp_directory": str(spill)})
    try:
        mend = "Fetch the damaged file again, or leave it out of the recipe"
        with explaining(f"engine.memory = {engine.memory}", f"{spill} (engine.spill)", mend):
            if engine.threads:
                connection.execute(f"SET threads = {engine.threads}")
            # No extension is fetched from the network behind the user's back.
            connection.execute("SET autoinstall_known_extensions = false")
            connection.execute("SET enable_progress_bar = false")
            register_laion_hash(connection)
            if remote:
                connection.register_filesystem(remote_files())
            yield connection
    finally:
        connection.close()


@contextmanager
def explaining(memory: str, spill: str, mend: str) -> Iterator[None]:
    """Turns what DuckDB raises for want of memory, disk or whole files into one message.

    What it raises for our own SQL (binder, parser) is not among these: that is no one's data.

    Args:
        memory: what bounds its memory, in the user's words.
        spill: where its temporary files go.
        mend: what to do about a damaged file, which DuckDB names.

    Raises:
        DataError: memory is not enough, or a file is damaged.
        PlaceUnusable: the disk of the output or of the temporary files is full.
        StoreUnreachable: a store does not answer, or does not let us in.
    """
    try:
        yield
    except (duckdb.OperationalError, duckdb.DataError, duckdb.InvalidInputException) as error:
        said = str(error)
        if any(sign in said for sign in _FULL_DISK):
            raise PlaceUnusable(
                f"The disk is full: temporary files go to {spill}, and the output is made beside its final "
                "place. Make room, then the same command again"
            ) from None
        fix = f"It has {memory} and writes temporary files to {spill}" if _NO_MEMORY in said else mend
        raise DataError(f"DuckDB cannot go on: {said.splitlines()[0]}. {fix}") from None
    except duckdb.Error as error:
        if not _is_the_stores(error):
            raise
        # Its words may quote a request with its signature.
        raise StoreUnreachable(
            "DuckDB cannot read from the object store any more; look at its address and your keys. The same "
            "command goes on once it answers"
        ) from None


def _is_the_stores(error: Exception) -> bool:
    """Whether it is what a file system in Python has raised, which DuckDB hands on as no kind of its own."""
    return type(error) is duckdb.Error


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that paths, globs and `s3://` addresses stand for, sorted in each pattern, without repeats.

    A folder stands for the parquet files in it.

    Raises:
        DataError: a pattern stands for nothing.
    """
    found: dict[str, None] = {}
    problems = Problems()
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        matches = sorted(matching_files(path, ".parquet"))
        if not matches:
            problem = "a folder without parquet files" if os.path.isdir(path) else "no such file"
            problems.add(pattern, problem, "give a parquet file, a folder or a glob of them")
        found.update(dict.fromkeys(matches))
    problems.raise_if_any(DataError, "Metadata tables are missing")
    return list(found)


def input_versions(recipe: FilterRecipe, sources: Sequence[str]) -> dict[str, str]:
    """File -> version of the sources, the joins' tables and the lists; DataError where a table is missing."""
    lists = [rule.file for rule in recipe.rules if isinstance(rule, ListRule) and rule.file]
    joined = [pattern for join in recipe.joins for pattern in join.files]
    files = (
        *sources,
        *expand(joined),
        *filter(os.path.isfile, lists),
    )  # an absent list is its rule's mistake
    return {file: file_version(file) for file in files}


def group_files(connection: duckdb.DuckDBPyConnection, files: Sequence[str]) -> list[FileGroup]:
    """Files by their columns and types.

    Raises:
        DataError: files that are no parquet, or have no column that we know a row by; all of them named.
    """
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    problems = Problems()
    for file in files:
        try:
            described = connection.execute(
                f"DESCRIBE SELECT * FROM read_parquet({sql_text(file)})"
            ).fetchall()
        except duckdb.OutOfMemoryException:
            raise  # not the file's fault
        except (duckdb.Error, OSError) as error:
            if _is_the_stores(error):
                raise
            problems.add(
                file, f"cannot be read as parquet ({str(error).splitlines()[0]})", "remove or replace it"
            )
            continue
        columns = tuple((name, kind) for name, kind, *_ in described)
        if not FileGroup((file,), columns).provided() & set(IDENTITIES):
            names = ", ".join(name for name, _ in columns)
            problems.add(file, f"has none of the columns {', '.join(IDENTITIES)}", f"it has: {names}")
        groups.setdefault(columns, []).append(file)
    problems.raise_if_any(DataError, "Metadata tables cannot be used")
    return [FileGroup(tuple(paths), columns) for columns, paths in groups.items()]


def source_sql(
    connection: duckdb.DuckDBPyConnection, recipe: FilterRecipe, groups: Sequence[FileGroup]
) -> str:
    """SQL of all rows in our schema, with the joined columns and the row's `place`.

    For each join it makes the table of the rows that are not the best of their key.
    """
    hashed = "hash" in {join.by for join in recipe.joins}.union(*(rule.needs() for rule in recipe.rules))
    firsts = accumulate((len(group.files) for group in groups), initial=0)
    rows = " UNION ALL ".join(group.scan(hashed, first) for group, first in zip(groups, firsts, strict=False))
    for number, join in enumerate(recipe.joins):
        rows = _joined(connection, rows, join, number)
    if recipe.caption == "recaption":
        rows = f"SELECT * REPLACE (coalesce(nullif(trim(recaption), ''), caption) AS caption) FROM ({rows})"
    return rows


def _joined(connection: duckdb.DuckDBPyConnection, rows: str, join: JoinSection, number: int) -> str:
    files = expand(join.files)
    table = f"read_parquet({sql_list(files)}, union_by_name = true)"
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except (duckdb.Error, OSError) as error:
        if _is_the_stores(error):
            raise
        raise DataError(f"joins.{number}: {files[0]} cannot be read as parquet: {error}") from None
    group = FileGroup(tuple(files), tuple((name, kind) for name, kind, *_ in described))
    present = {name for name, _ in group.columns}
    key = join.key or join.by
    computed = key == "hash" and group.can_be_hashed
    absent = [name for name in (key, *join.columns.values()) if name not in present]
    if absent and not (computed and absent == ["hash"]):
        has = ", ".join(sorted(present))
        raise DataError(f"joins.{number}: {files[0]} has no column {', '.join(absent)}; it has {has}")
    picked = ", ".join(
        f"{sql_cast(sql_name(theirs), ours)} AS {ours}" for ours, theirs in join.columns.items()
    )
    key_sql = group.hash_sql() if computed else sql_cast(sql_name(key), join.by)
    extra = f"SELECT {key_sql} AS join_key, {picked}, {sql_place()} AS place FROM {table}"
    extra = f"SELECT * FROM ({extra}) WHERE join_key::VARCHAR <> ''"
    if mark_worse(connection, extra, "join_key::VARCHAR", join.prefer, f"worse_{number}"):
        extra = f"{extra} AND place NOT IN (SELECT place FROM worse_{number})"
    replaced = ", ".join(f"coalesce(extra.{ours}, source.{ours}) AS {ours}" for ours in join.columns)
    return (
        f"SELECT source.* REPLACE ({replaced}) FROM ({rows}) AS source "
        f"LEFT JOIN ({extra}) AS extra ON source.{join.by} = extra.join_key"
    )


def load_list(connection: duckdb.DuckDBPyConnection, rule: ListRule, place: int) -> None:
    """Make the table `list_<place>` that the rule's condition reads.

    Raises:
        DataError: the list's file is missing or is not what its name says.
    """
    if rule.file is None:
        values = rule.values
    else:
        path = Path(rule.file)
        if not path.is_file():
            raise DataError(f"rules.{place}: the list {path} does not exist")
        if rule.is_subset:
            _load_subset(connection, path, place)
            return
        if path.suffix == ".parquet":
            _load_column(connection, path, place)
            values = []
        else:
            values = _lines(path, place)
    if rule.file is None or not rule.file.endswith(".parquet"):
        connection.execute(f"CREATE TEMP TABLE list_{place} AS SELECT DISTINCT unnest(?) AS value", [values])
    if rule.by in DIGESTS:
        connection.execute(f"UPDATE list_{place} SET value = {sql_cast('value', rule.by)}")
    if rule.by == "url":
        connection.execute(f"UPDATE list_{place} SET value = {listed_url('value')}")
    if rule.by == "domain":
        _match_domains(connection, place)


def _match_domains(connection: duckdb.DuckDBPyConnection, place: int) -> None:
    """Make the macro `listed_<place>(host)`: whether a host, or a domain above it, is on the list."""
    connection.execute(f"UPDATE list_{place} SET value = trim(regexp_replace(lower(value), '^\\*', ''), '.')")
    labels = f"SELECT DISTINCT len(string_split(value, '.')) FROM list_{place} WHERE value <> ''"
    # A domain of n labels stands for the hosts whose last n labels it is.
    ends = [
        f"array_to_string(string_split(host, '.')[-{n}:], '.') IN (SELECT value FROM list_{place})"
        for (n,) in connection.execute(labels).fetchall()
    ]
    connection.execute(f"CREATE TEMP MACRO listed_{place}(host) AS ({' OR '.join(ends) or 'false'})")


def _lines(path: Path, place: int) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"rules.{place}: the list {path} is not UTF-8 (byte {error.start}); convert it"
        ) from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _load_column(connection: duckdb.DuckDBPyConnection, path: Path, place: int) -> None:
    table = f"read_parquet({sql_text(str(path))})"
    try:
        first = connection.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()[0][0]
        source = f"SELECT CAST({sql_name(first)} AS VARCHAR) AS value FROM {table}"
        connection.execute(f"CREATE TEMP TABLE list_{place} AS SELECT DISTINCT value FROM ({source})")
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"rules.{place}: the list {path} cannot be read as parquet ({reason})") from None


def _load_subset(connection: duckdb.DuckDBPyConnection, path: Path, place: int) -> None:
    import pyarrow as pa

    try:
        subset = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"rules.{place}: {path} cannot be read as DataComp's 'u8,u8' ({error})") from None
    names: tuple[str, ...] = subset.dtype.names or ()
    if [subset.dtype[name] for name in names] != [np.dtype("<u8")] * 2:
        raise DataError(f"rules.{place}: {path} has dtype {subset.dtype}, expected DataComp's 'u8,u8'")
    halves = pa.table({"high": pa.array(subset[names[0]]), "low": pa.array(subset[names[1]])})
    connection.register(f"subset_{place}", halves)
    connection.execute(f"CREATE TEMP TABLE list_{place} AS SELECT high, low FROM subset_{place}")
    connection.unregister(f"subset_{place}")
