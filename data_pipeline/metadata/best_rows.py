"""One row of those that share a key: which of them is the best."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from data_pipeline.metadata.rules import Preference


def mark_worse(
    connection: duckdb.DuckDBPyConnection, rows: str, key: str, prefer: Sequence[Preference], table: str
) -> int:
    """Make a table of the `place` of each row that is not the best of its key; their number.

    Args:
        connection: which gets the table.
        rows: SQL of rows with `place`, their number in an order, and the columns that are compared.
        key: SQL of their key, a text. A row without one, or with an empty one, is alone.
        prefer: what makes a row the better one, first things first; the earliest of those that tie is it.
        table: name of the new table.
    """
    order = [f"{p.column} {'DESC' if p.order == 'highest' else 'ASC'} NULLS LAST" for p in prefer]
    columns = ", ".join(["place", *dict.fromkeys(p.column for p in prefer)])
    # Keys are compared by 128 bits of MD5: rows of a fixed, small size, and no collision to be expected
    # below 10^17 rows. A row without a value is alone with its number. (A condition on the key instead
    # would be computed once more.)
    own = f"coalesce(md5_number(nullif({key}, '')), place::UHUGEINT)"
    keyed = f"SELECT {own} AS key, {columns} FROM ({rows})"
    ranked = (
        "SELECT place, row_number() OVER (PARTITION BY key "
        f"ORDER BY {', '.join([*order, 'place'])}) AS rank FROM ({keyed})"
    )
    connection.execute(f"CREATE TEMP TABLE {table} AS SELECT place FROM ({ranked}) WHERE rank > 1")
    return int(connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])
