"""The rules of a filter recipe. Each is an entry of `rules`, and they apply in the order in which they stand.

A *row rule* decides on a row by itself and compiles to one SQL condition. A *table rule* (`top_fraction`,
`deduplicate`) decides on a row by looking at all rows that the rules before it have kept.

A row whose value is missing fails a rule about that value, unless the rule says `missing: keep`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.ingest.storage import LocalPath
from data_pipeline.metadata.schema import listed_url, sql_text
from foundation.sections import Problem, Section, check

Score = Literal[
    "similarity",
    "clip_b32",
    "clip_l14",
    "aesthetic",
    "punsafe",
    "watermark",
    "recaption_clip",
    "caption_clip",
]
Missing = Literal["drop", "keep"]
WORDS = "len(regexp_extract_all({text}, '\\S+'))"
# What may stand beside a whole word: RE2's \W would be every letter beyond ASCII. In scripts that put no
# space between words, any letter may.
NOT_IN_A_WORD = r"[^\p{L}\p{M}\p{N}_]|[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
DOMAIN = "rtrim(regexp_extract(lower(url), '^[a-z][a-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)', 1), '.')"
Bound = Annotated[float, Field(allow_inf_nan=False)]


class RowRule(Section):
    """A rule about a single row."""

    def condition(self, place: int) -> str:
        """SQL that is true for rows to keep (null counts as false); `place` is the rule's index."""
        raise NotImplementedError

    def needs(self) -> set[str]:
        """Columns that the rule reads; at least one source must have them."""
        raise NotImplementedError

    def label(self) -> str:
        """The rule in a few words, for the funnel."""
        raise NotImplementedError


class ScoreRule(RowRule):
    """Bounds on a score: `above` (>), `min` (>=), `below` (<), `max` (<=)."""

    rule: Literal["score"]
    column: Score
    above: Bound | None = None
    min: Bound | None = None
    below: Bound | None = None
    max: Bound | None = None
    missing: Missing = "drop"

    @check
    def _has_a_bound(self) -> Iterator[Problem]:
        if not self._bounds():
            yield "", "a score rule needs a bound: above (>), min (>=), below (<) or max (<=)"

    def _bounds(self) -> list[tuple[str, float]]:
        bounds = ((">", self.above), (">=", self.min), ("<", self.below), ("<=", self.max))
        return [(sign, value) for sign, value in bounds if value is not None]

    def condition(self, place: int) -> str:
        bounds = " AND ".join(f"{self.column} {sign} {value!r}" for sign, value in self._bounds())
        return _or_missing(bounds, [self.column], self.missing)

    def needs(self) -> set[str]:
        return {self.column}

    def label(self) -> str:
        return " and ".join(f"{self.column} {sign} {value:g}" for sign, value in self._bounds())


class SizeRule(RowRule):
    """Bounds in pixels on the picture's sides and in square pixels on its area, all inclusive."""

    rule: Literal["size"]
    shorter_min: int = Field(0, ge=0)
    longer_max: int | None = Field(None, gt=0)
    area_min: int = Field(0, ge=0)
    area_max: int | None = Field(None, gt=0)
    missing: Missing = "drop"

    @check
    def _has_a_bound(self) -> Iterator[Problem]:
        if not (self.shorter_min or self.area_min or self.longer_max or self.area_max):
            yield "", "a size rule needs a bound: shorter_min, longer_max, area_min or area_max"

    def _parts(self) -> list[tuple[str, str]]:
        area = "width::DOUBLE * height"  # of sides that no picture has, a product of integers would overflow
        bounds = (
            ("least(width, height) >=", "shorter side >=", self.shorter_min),
            ("greatest(width, height) <=", "longer side <=", self.longer_max),
            (f"{area} >=", "area >=", self.area_min),
            (f"{area} <=", "area <=", self.area_max),
        )
        return [(f"{sql} {value}", f"{words} {value}") for sql, words, value in bounds if value]

    def condition(self, place: int) -> str:
        bounds = " AND ".join(sql for sql, _ in self._parts())
        return _or_missing(f"width > 0 AND height > 0 AND {bounds}", ["width", "height"], self.missing)

    def needs(self) -> set[str]:
        return {"width", "height"}

    def label(self) -> str:
        return " and ".join(words for _, words in self._parts())


class AspectRule(RowRule):
    """Longer side over shorter side, at most `max`."""

    rule: Literal["aspect"]
    max: float = Field(ge=1.0, allow_inf_nan=False)
    missing: Missing = "drop"

    def condition(self, place: int) -> str:
        shorter = "least(width, height)"
        bound = f"{shorter} > 0 AND greatest(width, height) <= {self.max!r}::DOUBLE * {shorter}"
        return _or_missing(bound, ["width", "height"], self.missing)

    def needs(self) -> set[str]:
        return {"width", "height"}

    def label(self) -> str:
        return f"aspect <= {self.max:g}"


class CaptionRule(RowRule):
    """Length of the caption in words (runs of non-space) and characters, and words that it must not have.

    Words are looked for whole, in any language, and without regard to case; where a script puts no space
    between words, anywhere. A missing caption counts as the empty one.
    """

    rule: Literal["caption"]
    words_min: int = Field(0, ge=0)
    words_max: int | None = Field(None, gt=0)
    chars_min: int = Field(0, ge=0)
    chars_max: int | None = Field(None, gt=0)
    without: list[str] = Field(default_factory=list)

    @check
    def _has_a_bound(self) -> Iterator[Problem]:
        if not (self.words_min or self.words_max or self.chars_min or self.chars_max or self.without):
            yield "", "a caption rule needs words_min, words_max, chars_min, chars_max or without"

    def condition(self, place: int) -> str:
        text = "coalesce(trim(caption), '')"
        words = WORDS.format(text=text)
        bounds = (
            (f"length({text}) >=", self.chars_min),
            (f"length({text}) <=", self.chars_max),
            (f"{words} >=", self.words_min),
            (f"{words} <=", self.words_max),
        )
        parts = [f"{sql} {value}" for sql, value in bounds if value]
        if self.without:
            words = "|".join(re.escape(word) for word in self.without)
            pattern = f"(?i)(^|{NOT_IN_A_WORD})({words})($|{NOT_IN_A_WORD})"
            parts.append(f"NOT regexp_matches({text}, {sql_text(pattern)})")
        return " AND ".join(parts)

    def needs(self) -> set[str]:
        return {"caption"}

    def label(self) -> str:
        bounds = (
            ("words >=", self.words_min),
            ("words <=", self.words_max),
            ("characters >=", self.chars_min),
            ("characters <=", self.chars_max),
        )
        parts = [f"{words} {value}" for words, value in bounds if value]
        parts += [f"without {len(self.without)} words"] if self.without else []
        return "caption: " + ", ".join(parts)


class LanguageRule(RowRule):
    """The table's `language` is one of `allow` (compared without regard to case)."""

    rule: Literal["language"]
    allow: list[str] = Field(min_length=1)
    missing: Missing = "drop"

    def condition(self, place: int) -> str:
        values = ", ".join(sql_text(value.lower()) for value in self.allow)
        return _or_missing(f"lower(language) IN ({values})", ["language"], self.missing)

    def needs(self) -> set[str]:
        return {"language"}

    def label(self) -> str:
        return f"language in {', '.join(self.allow)}"


class ListRule(RowRule):
    """`allow`: keep only rows on the list; `deny`: drop rows on the list.

    The list is `values`, or `file`: a text file with one value a line, a parquet file whose first column
    has the values, or, for `by: uid`, DataComp's `.npy` of (u8, u8). Urls are compared as `deduplicate` does,
    texts that are none as they are. A domain stands for all hosts below it:
    `bad.example` for `www.bad.example`, too.
    """

    rule: Literal["allow", "deny"]
    by: Literal["uid", "sha256", "url", "hash", "domain"]
    values: list[str] = Field(default_factory=list)
    file: LocalPath | None = None

    @check
    def _has_one_list(self) -> Iterator[Problem]:
        if bool(self.values) == bool(self.file):
            yield "", f"a {self.rule} rule needs either values or file"

    @check
    def _uids_are_looked_up_by_uid(self) -> Iterator[Problem]:
        if self.is_subset and self.by != "uid":
            yield "by", f"{self.file} is a list of uids, and the rule is by {self.by}; write by: uid"

    @property
    def is_subset(self) -> bool:
        """Whether the list is a DataComp subset file."""
        return self.file is not None and self.file.endswith(".npy")

    def condition(self, place: int) -> str:
        if self.is_subset:
            key = "(('0x' || uid[1:16])::UBIGINT, ('0x' || uid[17:32])::UBIGINT)"
            key = f"CASE WHEN regexp_full_match(uid, '[0-9a-fA-F]{{32}}') THEN {key} END"
            member = f"{key} IN (SELECT (high, low) FROM list_{place})"
        elif self.by == "domain":
            member = f"listed_{place}({DOMAIN})"
        elif self.by == "url":
            member = f"{listed_url('url')} IN (SELECT value FROM list_{place})"
        else:
            member = f"CAST({self.by} AS VARCHAR) IN (SELECT value FROM list_{place})"
        member = f"coalesce({member}, false)"
        return member if self.rule == "allow" else f"NOT {member}"

    def needs(self) -> set[str]:
        return {"url" if self.by == "domain" else self.by}

    def label(self) -> str:
        return f"{self.rule} {self.by}: {self.file or f'{len(self.values)} values'}"


class TopFractionRule(Section):
    """The `fraction` of the rows so far with the highest score; rows that tie with the last one stay too."""

    rule: Literal["top_fraction"]
    column: Score
    fraction: float = Field(gt=0.0, le=1.0)

    def needs(self) -> set[str]:
        """Columns that the rule reads."""
        return {self.column}

    def label(self) -> str:
        """The rule in a few words."""
        return f"top {self.fraction:.4g} by {self.column}"


class Preference(Section):
    """Which of several equal rows is better."""

    column: Score | Literal["width", "height"]
    order: Literal["highest", "lowest"] = "highest"


class DeduplicateRule(Section):
    """One row for each value of `by`: the best by `prefer`, the earliest of those that tie.

    A url is compared normalized: scheme, `www.`, default port, fragment, trailing slash and the host's case
    do not matter. Rows without a value are no one's duplicate.
    """

    rule: Literal["deduplicate"]
    by: Literal["uid", "sha256", "url", "hash"]
    prefer: list[Preference] = Field(default_factory=list)

    def needs(self) -> set[str]:
        """Columns that the rule reads."""
        return {self.by, *(preference.column for preference in self.prefer)}

    def label(self) -> str:
        """The rule in a few words."""
        return f"one row per {self.by}"


Rule = Annotated[
    ScoreRule
    | SizeRule
    | AspectRule
    | CaptionRule
    | LanguageRule
    | ListRule
    | TopFractionRule
    | DeduplicateRule,
    Field(discriminator="rule"),
]


def _or_missing(condition: str, columns: list[str], missing: Missing) -> str:
    if missing == "drop":
        return condition
    absent = " OR ".join(f"{column} IS NULL" for column in columns)
    return f"({absent} OR ({condition}))"
