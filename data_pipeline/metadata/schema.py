"""One schema for the metadata tables of LAION, LAION-Aesthetics, COYO, DataComp and Recap-DataComp.

Types vary from file to file (`WIDTH` is float64 in one release and int32 in the next), so every column is
cast; what cannot be cast becomes null. Texts among the sources' numbers are counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Our column -> SQL type, and the names that it goes by in the releases (case does not matter; the first
# that a file has is taken). LAION's `similarity` is CLIP B/32 in LAION-400M and L/14 in LAION-5B, so it
# keeps its name.
COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "uid": ("VARCHAR", ("uid", "id")),
    "url": ("VARCHAR", ("url",)),
    "caption": ("VARCHAR", ("caption", "text", "txt", "org_caption")),
    "recaption": ("VARCHAR", ("recaption", "re_caption")),
    "width": ("BIGINT", ("original_width", "width")),
    "height": ("BIGINT", ("original_height", "height")),
    "sha256": ("VARCHAR", ("sha256",)),
    "hash": ("BIGINT", ("hash",)),
    "language": ("VARCHAR", ("language",)),
    "nsfw": ("VARCHAR", ("nsfw",)),
    "license": ("VARCHAR", ("license",)),
    "similarity": ("DOUBLE", ("similarity",)),
    "clip_b32": ("DOUBLE", ("clip_b32", "clip_b32_similarity_score", "clip_similarity_vitb32")),
    "clip_l14": ("DOUBLE", ("clip_l14", "clip_l14_similarity_score", "clip_similarity_vitl14")),
    "aesthetic": ("DOUBLE", ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2")),
    "punsafe": ("DOUBLE", ("punsafe", "nsfw_score_opennsfw2")),
    "watermark": ("DOUBLE", ("watermark", "pwatermark", "watermark_score")),
    "recaption_clip": ("DOUBLE", ("recaption_clip", "re_clip_score")),
    "caption_clip": ("DOUBLE", ("caption_clip", "org_clip_score")),
}
SCORES = tuple(name for name, (kind, _) in COLUMNS.items() if kind == "DOUBLE")
IDENTITIES = ("uid", "url", "sha256", "hash")
DIGESTS = ("uid", "sha256")  # texts of hex digits, whose case and surrounding spaces say nothing
# `place`, a row's number in the order of the sources, is its file's number and, in so many bits, its own.
FILE_ROWS_BITS = 40
_HEX = "[0-9a-fA-F]+"
_URL = "^(?i:[a-z][a-z0-9+.-]*)://(?:[^/?#@]*@)?(?i:www\\.)?([^/?#:]+)(:[0-9]+)?[^/?#]*([^#]*)"


@dataclass(frozen=True)
class FileGroup:
    """Files of one release: the same column names and types.

    Attributes:
        files: paths or `s3://` addresses.
        columns: name -> DuckDB type, as the files have them.
    """

    files: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]

    def source_of(self, column: str) -> str | None:
        """The files' own name of one of our columns; None where they have none."""
        ours = {name.lower(): name for name, _ in reversed(self.columns)}
        return next((ours[alias] for alias in COLUMNS[column][1] if alias in ours), None)

    @property
    def can_be_hashed(self) -> bool:
        """Whether LAION's hash, absent, follows from columns that are there."""
        absent = {column for column in ("hash", "url", "caption") if self.source_of(column) is None}
        return absent == {"hash"}

    def provided(self) -> set[str]:
        """Our columns that the files have, or that follow from those they have."""
        own = {column for column in COLUMNS if self.source_of(column) is not None}
        return own | {"hash"} if self.can_be_hashed else own

    def scan(self, hashed: bool, first: int) -> str:
        """SQL that reads the files in our schema, all columns present, absent ones null, and `place`.

        Args:
            hashed: whether `hash` is computed where it is absent and can be.
            first: number of the first file among all groups' files.
        """
        wanted = ", ".join(
            f"{self.hash_sql() if column == 'hash' and hashed and self.can_be_hashed else self._cast(column)}"
            f" AS {column}"
            for column in COLUMNS
        )
        return f"SELECT {wanted}, {sql_place(first)} AS place FROM read_parquet({sql_list(self.files)})"

    def hash_sql(self) -> str:
        """SQL of LAION's hash of a row, for `can_be_hashed` files."""
        return f"laion_hash({self._cast('url')}, {self._cast('caption')})"

    def uncastable(self) -> str | None:
        """SQL that counts texts that are no numbers, a column each; None where no column has texts."""
        text = {name for name, kind in self.columns if kind in ("VARCHAR", "BLOB")}
        counts = []
        for column, (kind, _) in COLUMNS.items():
            source = self.source_of(column)
            if source in text and kind != "VARCHAR":
                quoted = sql_name(source)
                lost = f"{quoted} IS NOT NULL AND {self._cast(column)} IS NULL"
                counts.append(f"count(*) FILTER (WHERE {lost}) AS {column}")
        return f"SELECT {', '.join(counts)} FROM read_parquet({sql_list(self.files)})" if counts else None

    def _cast(self, column: str) -> str:
        source = self.source_of(column)
        return f"NULL::{COLUMNS[column][0]}" if source is None else sql_cast(sql_name(source), column)


def sql_cast(value: str, column: str) -> str:
    """SQL of a value as one of our columns has it, null where it cannot be cast.

    Scores are finite numbers or null, digests are as `plain_digest` has them.
    """
    kind = COLUMNS[column][0]
    cast = f"TRY_CAST({value} AS {kind})"
    if column in DIGESTS:
        text = f"trim({cast})"
        return f"CASE WHEN regexp_full_match({text}, '{_HEX}') THEN lower({text}) ELSE {text} END"
    # DuckDB orders NaN above every number, so that it would pass every lower bound. (`= 'NaN'` would not find
    # it: the optimizer rules that out by a parquet file's bounds, which leave NaN aside.)
    return f"CASE WHEN isfinite({cast}) THEN {cast} END" if kind == "DOUBLE" else cast


def sql_place(first: int = 0) -> str:
    """SQL of a row's number in the order of the files that are read; `first` is the first file's number."""
    # DuckDB reads its virtual columns only where they are asked for.
    return f"(file_index + {first})::UBIGINT << {FILE_ROWS_BITS} | file_row_number::UBIGINT"


def normalized_url(url: str) -> str:
    """SQL of what urls of the same place have in common, empty for what is no url.

    Scheme, `www.`, default port, fragment, trailing slash and the host's case are left out.
    """
    parts = f"regexp_extract({url}, '{_URL}', ['host', 'port', 'rest'])"  # one match: it is what costs
    return (
        f"lower({parts}.host) || CASE WHEN {parts}.port NOT IN (':80', ':443') "
        f"THEN {parts}.port ELSE '' END || rtrim({parts}.rest, '/')"
    )


def listed_url(url: str) -> str:
    """SQL of what a url is looked up in a list by: normalized, or as it is where it is none."""
    return f"coalesce(nullif({normalized_url(url)}, ''), {url})"


def plain_digest(text: str) -> str:
    """A digest as our tables have it: without spaces around; hex digits, which some write large, small."""
    text = text.strip(" ")
    return text.lower() if re.fullmatch(_HEX, text) else text


def sql_name(name: str) -> str:
    """A column name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    """A string literal for SQL."""
    return "'" + value.replace("'", "''") + "'"


def sql_list(values: Sequence[str]) -> str:
    """A list of string literals for SQL."""
    return "[" + ", ".join(sql_text(value) for value in values) + "]"
