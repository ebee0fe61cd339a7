"""`bitdance data filter`: metadata tables in, the kept rows and the funnel out.

Everything streams through DuckDB. Consecutive row rules share two scans: one that only reads their columns
and counts, and the last one, which writes. A table rule looks at what is left so far: `top_fraction` finds
its exact threshold by a histogram and one bin, `deduplicate` drops by row number.

    OUTPUT/kept.parquet     the rows in our schema (`schema.COLUMNS`), in the order of the sources, files with
                            the same columns together
    OUTPUT/subset.npy       DataComp's subset format: sorted (u8, u8), where the kept rows have 32-digit uids
    OUTPUT/funnel.json, funnel.png, recipe.json
    OUTPUT/inputs.json      the files that were read, each with its version
"""

from __future__ import annotations

import glob
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np

from data_pipeline.metadata.best_rows import mark_worse
from data_pipeline.metadata.engine import (
    expand,
    group_files,
    input_versions,
    load_list,
    open_engine,
    source_sql,
)
from data_pipeline.metadata.funnel import Funnel, FunnelStep, draw_funnel, print_funnel
from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.metadata.rules import DeduplicateRule, ListRule, RowRule, TopFractionRule
from data_pipeline.metadata.schema import IDENTITIES, normalized_url, sql_text
from data_pipeline.npy_stream import NpyStream
from data_pipeline.recipe_folder import RECORD_NAME, check_inputs, claim_folder, recipe_record
from data_pipeline.store import writing_to
from foundation.errors import DataError, Problems, RecipeError
from foundation.files import commit_folder
from foundation.json_files import read_json
from foundation.partials import PARTIAL_SUFFIX, partial_path, sweep_abandoned
from foundation.progress import say

INPUTS_NAME = "inputs.json"
MEND = "remove its folder, and `bitdance data filter` makes it anew"
HISTOGRAM_BINS = 4096
SUBSET_DTYPE, SUBSET_BATCH = np.dtype("u8,u8"), 1 << 18  # DataComp's; rows fetched at a time


def run_filter(recipe: FilterRecipe) -> Funnel:
    """Carry out a filter recipe; where its output is complete already, print its funnel again.

    Raises:
        RecipeError: the output belongs to another recipe or was made of other files, or a rule reads a
            column that no source has.
        DataError: sources that are missing or broken, or no row left.
        PlaceUnusable: the disk of the output or of `engine.spill` is full, or cannot be written.
        StoreUnreachable: a store of the tables does not answer, or does not let us in.
    """
    with writing_to(recipe.output):
        return _run(recipe)


def _run(recipe: FilterRecipe) -> Funnel:
    files = expand(recipe.sources)
    inputs = input_versions(recipe, files)
    output = Path(recipe.output)
    if claim_folder(output, recipe, "funnel.json"):
        then = read_json(output / INPUTS_NAME, MEND) if (output / INPUTS_NAME).exists() else {}
        check_inputs(output, then, inputs)
        funnel = read_funnel(output)
        say(f"{output}: done already")
        print_funnel(funnel)
        return funnel
    sweep_abandoned(output.parent.glob(f".{glob.escape(output.name)}.*{PARTIAL_SUFFIX}"))
    partial = partial_path(output)
    partial.mkdir(parents=True)
    started = time.monotonic()
    try:
        spill = Path(recipe.engine.spill) if recipe.engine.spill else partial / "spill"
        joined = [file for join in recipe.joins for file in join.files]
        remote = any(path.startswith("s3://") for path in (*recipe.sources, *joined))
        with open_engine(recipe.engine, spill, remote) as connection:
            say(f"Filtering {len(files)} tables by {len(recipe.rules)} rules")
            funnel = _Filtering(connection, recipe, files, partial).run(started)
        if not funnel.kept:
            print_funnel(funnel)
            raise DataError("No row is left; the table above says which rule dropped them")
        shutil.rmtree(partial / "spill", ignore_errors=True)
        (partial / "funnel.json").write_text(funnel.to_json())
        (partial / RECORD_NAME).write_text(recipe_record(recipe))
        (partial / INPUTS_NAME).write_text(json.dumps(inputs, indent=1) + "\n")
        draw_funnel(funnel, partial / "funnel.png")
        commit_folder(partial, output)
    except FileExistsError:
        # Another run was faster: that of the same recipe has made the same.
        if not claim_folder(output, recipe, "funnel.json"):
            raise
        say(f"{output}: another run has finished it meanwhile")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print_funnel(funnel)
    rate = funnel.rows / max(funnel.seconds, 1e-9)
    say(f"{output / 'kept.parquet'}: {funnel.kept:,} rows ({rate:,.0f} rows/s)")
    return funnel


def read_funnel(folder: Path) -> Funnel:
    """The funnel of a finished filter folder."""
    values = read_json(folder / "funnel.json", MEND, "rows", "steps", "uncastable", "seconds")
    steps = tuple(FunnelStep(**step) for step in values["steps"])
    return Funnel(values["rows"], steps, values["uncastable"], values["seconds"])


class _Filtering:
    """One run: `self.rows` is always the SQL of the rows that are left."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, recipe: FilterRecipe, files: Sequence[str], partial: Path
    ):
        self.connection = connection
        self.recipe = recipe
        self.partial = partial
        self.groups = group_files(connection, files)
        self._check_columns()
        self.rows = source_sql(connection, recipe, self.groups)
        self.steps: list[FunnelStep] = []
        self.stages = 0

    def run(self, started: float) -> Funnel:
        """Apply the rules and write `kept.parquet` and `subset.npy`."""
        uncastable = self._count_uncastable()
        pending: list[tuple[int, RowRule]] = []
        for place, rule in enumerate(self.recipe.rules):
            if isinstance(rule, RowRule):
                pending.append((place, rule))
                continue
            self._apply_row_rules(pending)
            pending = []
            if isinstance(rule, TopFractionRule):
                self._apply_top_fraction(rule)
            else:
                self._apply_deduplicate(rule)
        self._apply_row_rules(pending)
        self._copy(self._in_order(), self.partial / "kept.parquet")
        for stage in self.partial.glob("stage-*.parquet"):
            stage.unlink()
        self._write_subset()
        total = self.steps[0].before
        return Funnel(total, tuple(self.steps), uncastable, round(time.monotonic() - started, 3))

    def _in_order(self) -> str:
        """SQL of the rows that are left, in the order of the sources."""
        rows = f"SELECT * EXCLUDE (place) FROM ({self.rows})"
        # DuckDB's scans and filters keep the order. Its joins, as which it does lists and duplicates, do not.
        joined = self.recipe.joins or any(
            isinstance(rule, ListRule | DeduplicateRule) for rule in self.recipe.rules
        )
        return f"{rows} ORDER BY place" if joined else rows

    def _check_columns(self) -> None:
        own = {column for group in self.groups for column in group.provided()}
        provided = own.union(*(join.columns for join in self.recipe.joins))
        problems = Problems()
        for place, join in enumerate(self.recipe.joins):
            if join.by not in own:
                have = ", ".join(name for name in IDENTITIES if name in own)
                problems.add(
                    f"joins.{place}",
                    f"no source has the column {join.by!r}, so nothing would be joined",
                    f"they can be joined by {have}",
                )
        for place, rule in enumerate(self.recipe.rules):
            for column in sorted(rule.needs() - provided):
                problems.add(
                    f"rules.{place} ({rule.label()})",
                    f"no source has the column {column!r}",
                    f"they have: {', '.join(sorted(provided))}; `joins` can add columns from other tables",
                )
        problems.raise_if_any(RecipeError, "The filter's rules do not fit its sources")

    def _count_uncastable(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for group in self.groups:
            query = group.uncastable()
            if query is None:
                continue
            result = self.connection.execute(query)
            names = [column[0] for column in result.description or ()]
            for name, count in zip(names, result.fetchall()[0], strict=True):
                counts[name] = counts.get(name, 0) + count
        for name, count in counts.items():
            if count:
                say(f"{count:,} values of {name} are not numbers and count as missing")
        return {name: count for name, count in counts.items() if count}

    def _apply_row_rules(self, rules: Sequence[tuple[int, RowRule]]) -> None:
        if not rules:
            return
        conditions = []
        for place, rule in rules:
            if isinstance(rule, ListRule):
                load_list(self.connection, rule, place)
            conditions.append(f"coalesce({rule.condition(place)}, false)")
        cases = " ".join(f"WHEN NOT {condition} THEN {i}" for i, condition in enumerate(conditions))
        query = (
            f"SELECT CASE {cases} ELSE {len(rules)} END AS step, count(*) FROM ({self.rows}) GROUP BY step"
        )
        dropped = dict(self.connection.execute(query).fetchall())
        before = sum(dropped.values())
        for i, (_, rule) in enumerate(rules):
            after = before - dropped.get(i, 0)
            self.steps.append(FunnelStep(rule.label(), before, after))
            before = after
        self.rows = f"SELECT * FROM ({self.rows}) WHERE {' AND '.join(conditions)}"

    def _apply_top_fraction(self, rule: TopFractionRule) -> None:
        self._stage()
        before = self._count(self.rows)
        threshold = self._nth_highest(rule.column, max(1, round(before * rule.fraction)))
        if threshold is None:
            self.rows = f"SELECT * FROM ({self.rows}) WHERE false"
            self.steps.append(FunnelStep(f"{rule.label()} (no row has it)", before, 0))
            return
        self.rows = f"SELECT * FROM ({self.rows}) WHERE {rule.column} >= {threshold!r}"
        self.steps.append(FunnelStep(f"{rule.label()} (>= {threshold:.4g})", before, self._count(self.rows)))

    def _nth_highest(self, column: str, n: int) -> float | None:
        """The n-th highest value, exactly, or the lowest of fewer values; None where there are none.

        A histogram finds the bin, then only that bin is sorted.
        """
        bounds = f"SELECT min({column}), max({column}), count({column}) FROM ({self.rows})"
        ((low, high, count),) = self.connection.execute(bounds).fetchall()
        if not count:
            return None
        if n > count or low == high:
            return float(low)
        scaled = f"({column} - {low!r}) / {(high - low)!r} * {HISTOGRAM_BINS}"
        bin_sql = f"least({HISTOGRAM_BINS - 1}, floor({scaled}))::INT"
        if not math.isfinite(high - low):
            bin_sql = "0"  # no bins can be told apart over such a range: everything is sorted
        query = (
            f"SELECT {bin_sql} AS bin, count(*) FROM ({self.rows}) WHERE {column} IS NOT NULL "
            "GROUP BY bin ORDER BY bin DESC"
        )
        above = 0
        for bin_number, size in self.connection.execute(query).fetchall():
            if above + size >= n:
                inside = (
                    f"SELECT {column} FROM ({self.rows}) WHERE {bin_sql} = {bin_number} "
                    f"ORDER BY {column} DESC LIMIT 1 OFFSET {n - above - 1}"
                )
                return float(self.connection.execute(inside).fetchall()[0][0])
            above += size
        raise AssertionError("the histogram holds fewer values than were counted")

    def _apply_deduplicate(self, rule: DeduplicateRule) -> None:
        self._stage()
        before = self._count(self.rows)
        key = normalized_url("url") if rule.by == "url" else f"lower(CAST({rule.by} AS VARCHAR))"
        table = f"duplicates_{self.stages}"
        dropped = mark_worse(self.connection, self.rows, key, rule.prefer, table)
        self.rows = f"SELECT * FROM ({self.rows}) WHERE place NOT IN (SELECT place FROM {table})"
        self.steps.append(FunnelStep(rule.label(), before, before - dropped))

    def _stage(self) -> None:
        """Write the rows that are left beside the output: a table rule goes over them several times."""
        self.stages += 1
        path = self.partial / f"stage-{self.stages}.parquet"
        self._copy(self.rows, path, "snappy")  # read a few times, and gone: zstd's time would be wasted
        self.rows = f"SELECT * FROM read_parquet({sql_text(str(path))})"

    def _copy(self, rows: str, path: Path, compression: str = "zstd") -> None:
        target = f"{sql_text(str(path))} (FORMAT parquet, COMPRESSION {compression})"
        self.connection.execute(f"COPY ({rows}) TO {target}")

    def _count(self, rows: str) -> int:
        # Not `fetchone`, which leaves the result open: DuckDB refuses other work on its connection then.
        return int(self.connection.execute(f"SELECT count(*) FROM ({rows})").fetchall()[0][0])

    def _write_subset(self) -> None:
        kept = sql_text(str(self.partial / "kept.parquet"))
        query = (
            "SELECT ('0x' || uid[1:16])::UBIGINT AS high, ('0x' || uid[17:32])::UBIGINT AS low "
            f"FROM read_parquet({kept}) WHERE regexp_full_match(uid, '[0-9a-fA-F]{{32}}') ORDER BY high, low"
        )
        # Sorted by DuckDB within its memory, and fetched piece by piece.
        batches = self.connection.sql(query).to_arrow_reader(SUBSET_BATCH)
        path = self.partial / "subset.npy"
        with NpyStream(path, SUBSET_DTYPE) as subset:
            for batch in batches:
                piece = np.empty(len(batch), SUBSET_DTYPE)
                piece["f0"], piece["f1"] = batch["high"].to_numpy(), batch["low"].to_numpy()
                subset.append(piece)
        if not subset.length:
            path.unlink()
