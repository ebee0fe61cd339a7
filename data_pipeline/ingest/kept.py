"""Joins a shard's samples with the rows that a filter has kept."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.ingest.key_index import (
    KeyIndex,
    build_index,
    open_table_query,
    remote_version,
    table_version,
)
from data_pipeline.ingest.made_once import make_once, sweep_unused, touch
from data_pipeline.ingest.recipe import KeepSection
from data_pipeline.ingest.samples import RawSample, printable
from data_pipeline.ingest.storage import is_remote
from data_pipeline.metadata.schema import COLUMNS, DIGESTS, IDENTITIES, SCORES, plain_digest, sql_text
from data_pipeline.own_cache import own_cache
from foundation.partials import PARTIAL_SUFFIX, sweep_abandoned


def rows_version(section: KeepSection) -> str:
    """Twelve hex digits that tell these rows from others under the same name.

    Raises:
        DataError: the rows are missing, or are no parquet.
        StoreUnreachable: their store does not answer.
    """
    return remote_version(section.rows) if is_remote(section.rows) else table_version(Path(section.rows))


def index_folder(section: KeepSection) -> Path:
    """The folder of the rows' index, built where it is missing.

    It lies beside the rows, for all jobs and hosts that want it, and is called after the rows' content; where
    nothing can be written there (on S3, or without the right to), in the user's folder in TMPDIR, for all
    jobs of this host. What was made of rows that were replaced is removed once no task has used it for a day,
    and so is everything in TMPDIR.

    Raises:
        DataError: the rows are missing, or are not what the filter writes.
        StoreUnreachable: their store does not answer.
    """
    rows = Path(section.rows)
    remote = is_remote(section.rows)
    version = rows_version(section)
    name = f"{rows.stem}-by-{section.by}-{version}"
    beside = not remote and ((rows.parent / name).is_dir() or os.access(rows.parent, os.W_OK))
    place = rows.parent if beside else own_cache("kept")
    table = re.escape(rows.stem) if beside else ".+"
    index = re.compile(rf"{table}-by-({'|'.join(IDENTITIES)})-[0-9a-f]{{12}}")
    current = version if beside else name
    old = (path for path in place.iterdir() if index.fullmatch(path.name) and not path.name.endswith(current))
    sweep_unused(old)
    sweep_abandoned(place.glob(f".*-by-*{PARTIAL_SUFFIX}"))
    make_once(place / name, partial(build_index, section.rows, section.by))
    touch(place / name)
    return place / name


class KeptRows:
    """The filter's output, asked for one shard at a time.

    What a question costs follows the shard and not the table.

    Args:
        by: the column that rows and samples share.
        index: the folder of the rows' index by it.
    """

    def __init__(self, by: str, index: Path):
        self.by = by
        self.folder = index
        self.index = KeyIndex(index)

    def rows(self, identities: Iterable[Any]) -> dict[Any, dict[str, Any]]:
        """Identity -> `{"caption": ..., "scores": {...}}` of those identities that were kept.

        Of several rows of one identity the table's last counts.
        """
        touch(self.folder)
        wanted = list({value for value in identities if value is not None})
        return {
            key: {"caption": caption, "scores": known_scores(zip(SCORES, scores, strict=True))}
            for key, caption, *scores in self.index.find(wanted)
        }


def kept_captions(section: KeepSection) -> Iterator[str]:
    """All captions of the filter's output, in its order."""
    with open_table_query(section.rows, Path(tempfile.gettempdir())) as connection:
        table = f"read_parquet({sql_text(section.rows)})"
        result = connection.execute(f"SELECT caption FROM {table} WHERE caption IS NOT NULL")
        while rows := result.fetchmany(10_000):
            yield from (row[0] for row in rows)


def identity(sample: RawSample, by: str) -> Any:
    """What a kept row would know the sample by; None where its fields lack it, or it cannot be a row's."""
    value = sample.fields.get(by)
    if value is None:
        return None
    try:
        if COLUMNS[by][0] != "BIGINT":
            text = plain_digest(str(value)) if by in DIGESTS else str(value)
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
