"""Joins a shard's samples with the rows that a filter has kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from data_pipeline.ingest.recipe import KeepSection
from data_pipeline.ingest.samples import RawSample, printable
from data_pipeline.ingest.storage import StoreUnreachable, is_remote, reaching, remote_files
from data_pipeline.metadata.schema import COLUMNS, SCORES, sql_text
from foundation.errors import DataError


class KeptRows:
    """The filter's output, asked for one shard at a time.

    A shard's question is one semi-join in DuckDB that reads the key column of the table once, and the other
    columns only where a key matches, so memory follows the shard and not the table.
    """

    def __init__(self, section: KeepSection):
        import duckdb

        self.by = section.by
        self.path = section.rows
        self.connection = duckdb.connect(config={"memory_limit": "2GB", "threads": 1})
        if is_remote(self.path):
            with reaching(self.path):
                if not remote_files().exists(self.path):
                    raise DataError(f"{self.path} does not exist")
            self.connection.register_filesystem(remote_files())
        try:
            described = self.connection.execute(f"DESCRIBE SELECT * FROM {self._table()}").fetchall()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.path} cannot be read as the filter's kept rows ({reason})") from None
        names = {row[0] for row in described}
        absent = {self.by, "caption", *SCORES} - names
        if absent:
            raise DataError(
                f"{self.path} lacks the columns {', '.join(sorted(absent))}: give the kept.parquet of "
                "`bitdance data filter`"
            )

    def _table(self) -> str:
        return f"read_parquet({sql_text(self.path)})"

    def rows(self, identities: Iterable[Any]) -> dict[Any, dict[str, Any]]:
        """Identity -> `{"caption": ..., "scores": {...}}` of those identities that were kept."""
        import duckdb
        import pyarrow as pa

        kind = pa.int64() if COLUMNS[self.by][0] == "BIGINT" else pa.string()
        distinct = sorted({value for value in identities if value is not None})
        wanted = pa.table({"wanted": pa.array(distinct, kind)})
        self.connection.register("wanted_keys", wanted)
        columns = ", ".join((self.by, "caption", *SCORES))
        query = f"SELECT {columns} FROM {self._table()} WHERE {self.by} IN (SELECT wanted FROM wanted_keys)"
        try:
            found = self.connection.execute(query).fetchall()
        except duckdb.IOException:
            # The table could be read a while ago. What DuckDB says may quote a request with its signature.
            raise StoreUnreachable(f"{self.path} cannot be read any more; the same command goes on") from None
        self.connection.unregister("wanted_keys")
        return {
            key: {"caption": caption, "scores": known_scores(zip(SCORES, scores, strict=True))}
            for key, caption, *scores in found
        }

    def captions(self) -> Iterator[str]:
        """All captions, in the table's order."""
        result = self.connection.execute(f"SELECT caption FROM {self._table()} WHERE caption IS NOT NULL")
        while rows := result.fetchmany(10_000):
            yield from (row[0] for row in rows)


def identity(sample: RawSample, by: str) -> Any:
    """What a kept row would know the sample by; None where its fields lack it, or it cannot be a row's."""
    value = sample.fields.get(by)
    if value is None:
        return None
    try:
        if COLUMNS[by][0] != "BIGINT":
            text = str(value)
            return text if printable(text) == text else None
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if -(1 << 63) <= number < 1 << 63 else None


def scores_of(fields: dict[str, Any]) -> dict[str, float]:
    """The scores among a shard's own columns, under our names."""
    lower = {name.lower(): value for name, value in fields.items()}
    return known_scores(
        (ours, next((lower[alias] for alias in COLUMNS[ours][1] if alias in lower), None)) for ours in SCORES
    )


def known_scores(pairs: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """The finite numbers among the pairs, to six digits: predictors promise less, and records stay small."""
    scores = {}
    for name, value in pairs:
        try:
            number = float(f"{float(value):.6g}")
        except (TypeError, ValueError, OverflowError):
            continue
        if number == number and abs(number) != float("inf"):
            scores[name] = number
    return scores
