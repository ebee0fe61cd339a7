"""The recipe of `bitdance data filter`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from data_pipeline.ingest.storage import LocalPath
from data_pipeline.metadata.rules import Preference, Rule
from data_pipeline.metadata.schema import COLUMNS, IDENTITIES
from foundation.sections import Problem, Section, check


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


class EngineSection(Section):
    """Bounds on what DuckDB takes.

    Attributes:
        memory: DuckDB's limit; what does not fit goes to `spill`.
        threads: all cores by default.
        spill: folder for temporary files; beside the output by default.
    """

    memory: str = Field(default="4GB", pattern=r"^\d+(\.\d+)? ?(MB|GB|TB|MiB|GiB|TiB)$")
    threads: int | None = Field(default=None, gt=0)
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
