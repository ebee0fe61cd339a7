"""The recipe of `bitdance data filter`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from data_pipeline.ingest.storage import LocalPath
from data_pipeline.metadata.rules import Preference, Rule
from data_pipeline.metadata.schema import COLUMNS, IDENTITIES
from foundation.sections import Problem, Section, check

# Above what one machine has of them DuckDB only gets slower; from tens of thousands on, the machine itself.
MAX_THREADS = 1024
_MEMORY = re.compile(r"(\d{1,6}(?:\.\d{1,6})?) ?(MB|GB|TB|MiB|GiB|TiB)")
_MEGABYTES = {"M": 1, "G": 1000, "T": 1_000_000}


class JoinSection(Section):
    """A table of more columns: scores, better captions, languages.

    Attributes:
        files: parquet paths, folders of them, globs or `s3://` addresses.
        by: our column to match by, and `key`, its name in the table where that differs.
        columns: our column -> the table's column. A value of the table goes before the source's own.
        prefer: by which of `columns` one of several rows of a key is the best, first things first; the
            earliest, in the order of the files, of those that tie. All values come from that row.
    """

    files: list[str] = Field(min_length=1)
    by: Literal["uid", "url", "sha256", "hash"]
    key: str | None = None
    columns: dict[str, str] = Field(min_length=1)
    prefer: list[Preference] = Field(default_factory=list)

    @check
    def _prefers_by_what_is_joined(self) -> Iterator[Problem]:
        for place, preference in enumerate(self.prefer):
            if preference.column not in self.columns:
                have = ", ".join(self.columns)
                yield (
                    f"prefer.{place}",
                    f"{preference.column} is not among the joined columns ({have}); add it",
                )

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, str]) -> dict[str, str]:
        wrong = sorted(set(columns) - (set(COLUMNS) - set(IDENTITIES)))
        if wrong:
            valid = ", ".join(name for name in COLUMNS if name not in IDENTITIES)
            raise ValueError(f"{', '.join(wrong)} cannot be joined; valid: {valid}")
        return columns


def memory_limit(text: str) -> str:
    """A limit of memory as DuckDB takes it, such as 4GB; ValueError for what is none, or below 1 MB."""
    match = _MEMORY.fullmatch(text)
    if not match or float(match[1]) * _MEGABYTES[match[2][0]] < 1:
        raise ValueError(f"{text!r} is no amount of memory from 1MB on; write it as 4GB or 512MiB")
    return text


class EngineSection(Section):
    """Bounds on what DuckDB takes.

    Attributes:
        memory: DuckDB's limit, at least 1MB; what does not fit goes to `spill`.
        threads: all cores by default; at most 1024.
        spill: folder for temporary files; beside the output by default.
    """

    memory: Annotated[str, AfterValidator(memory_limit)] = "4GB"
    threads: int | None = Field(default=None, gt=0, le=MAX_THREADS)
    spill: LocalPath | None = None


class FilterRecipe(Section):
    """From metadata tables to the rows worth having.

    Attributes:
        sources: parquet paths, folders of them, globs or `s3://` addresses, of any mix of releases.
        output: local folder for `kept.parquet`, `subset.npy` (where the rows have uids) and the funnel.
        joins: tables of more columns.
        rules: applied in order.
        caption: which caption goes on; `recaption` falls back to the original where there is none.
        engine: memory, threads and spill folder.
    """

    sources: list[str] = Field(min_length=1)
    output: LocalPath
    joins: list[JoinSection] = Field(default_factory=list)
    rules: list[Rule] = Field(min_length=1)
    caption: Literal["original", "recaption"] = "original"
    engine: EngineSection = EngineSection()
