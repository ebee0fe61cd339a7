"""`bitdance data download`: prepares the rows, runs img2dataset on them, sums up what it reports.

    OUTPUT/rows/NNNNN.parquet     what is asked for: addresses, captions, identities, scores
    OUTPUT/shards/NNNNN.tar, .parquet, _stats.json     img2dataset's, a tar per `samples_per_shard` rows
    OUTPUT/download.json          the sums; written once every row is accounted for
    OUTPUT/recipe.json, settings.json
    OUTPUT/rows.json     of which version of the rows file `rows/` was made, and what of it was left out
    OUTPUT/lock          held by the job and by all processes of the tool; who holds it

The tool passes over complete shards, so the same command goes on. Its processes die with the job; a second
job waits for the first one's last process.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.download.shards import complete_shards, forget_damaged
from data_pipeline.download.tool import TOOL, DownloadStopped, find_uv, run_tool, tool_command
from data_pipeline.ingest.storage import file_version
from data_pipeline.metadata.schema import SCORES, sql_name, sql_text
from data_pipeline.recipe_folder import RECORD_NAME, check_inputs, claim_folder, recipe_record
from foundation.errors import DataError
from foundation.files import atomic_write, commit_folder, open_locked
from foundation.json_files import read_json
from foundation.partials import PARTIAL_SUFFIX, partial_path, sweep_abandoned
from foundation.progress import say

DONE_NAME = "download.json"
ROWS_NAME = "rows.json"
SUMS = ("rows", "without_web_address", "success", "failed_to_download", "failed_to_resize", "reasons")
ROWS_PER_FILE = 1_000_000  # the tool reads a whole file of rows into memory
REASONS_SHOWN = 12


def run_download(recipe: DownloadRecipe) -> dict[str, Any]:
    """Fetch what is missing of the recipe's rows; the sums over all shards.

    Raises:
        RecipeError: uv is not there, or the output belongs to another recipe, or to rows that were replaced.
        DataError: the rows cannot be used, or not a single picture could be fetched.
        DownloadStopped: shards are missing after the tool has ended.
    """
    output = Path(recipe.output)
    _claim(output, recipe)
    if _begun(recipe, output) is None:
        find_uv()  # before anything is made
        _begin(recipe, output)
    sums = _finished(recipe, output)
    if sums is None:
        with _held(output) as lock:
            # Another job may have finished it while this one waited.
            sums = _finished(recipe, output) or _fetch(recipe, output, lock)
    if not sums["success"]:
        raise DataError(f"{output}: not a single picture could be fetched; the table above says why")
    return sums


def sum_up(stats: list[dict[str, Any]], skipped: int) -> dict[str, Any]:
    """Sums of img2dataset's `_stats.json` files, with the reasons by falling number."""
    reasons: Counter[str] = Counter()
    for part in stats:
        reasons.update(part["status_dict"])
    del reasons["success"]
    return {
        "rows": sum(part["count"] for part in stats),
        "without_web_address": skipped,
        "success": sum(part["successes"] for part in stats),
        "failed_to_download": sum(part["failed_to_download"] for part in stats),
        "failed_to_resize": sum(part["failed_to_resize"] for part in stats),
        "process_seconds": round(sum(part["duration"] for part in stats), 1),
        "reasons": dict(reasons.most_common()),
    }


def _claim(output: Path, recipe: DownloadRecipe) -> None:
    claim_folder(output, recipe, DONE_NAME, frozenset({"compute"}))


def _begun(recipe: DownloadRecipe, output: Path) -> int | None:
    """How many rows without a web address a folder that was begun has left out; None where there is none.

    Raises:
        FolderTaken: it was begun with other rows.
    """
    if not (output / RECORD_NAME).exists():
        return None
    begun = read_json(output / ROWS_NAME, f"remove {output} and start over", "without_web_address", "version")
    if os.path.exists(recipe.rows):  # if not, nothing has taken its place, and `rows/` is all that is needed
        check_inputs(output, {recipe.rows: begun["version"]}, {recipe.rows: file_version(recipe.rows)})
    return int(begun["without_web_address"])


def _begin(recipe: DownloadRecipe, output: Path) -> None:
    """Make the output folder with the recipe and the rows, whole or not at all."""
    sweep_abandoned(output.parent.glob(f".{glob.escape(output.name)}.*{PARTIAL_SUFFIX}"))
    partial = partial_path(output)
    (partial / "rows").mkdir(parents=True)
    try:
        version = file_version(recipe.rows)
        begun = {"version": version, "without_web_address": _write_rows(recipe, partial / "rows")}
        (partial / ROWS_NAME).write_text(json.dumps(begun) + "\n")
        (partial / RECORD_NAME).write_text(recipe_record(recipe))
        commit_folder(partial, output)
    except FileExistsError:
        # Another job was faster: that of the same recipe and rows has made the same.
        _claim(output, recipe)
        _begun(recipe, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _held(output: Path) -> Iterator[IO[str]]:
    """Hold the output for this process and all that inherit the file, once nobody else does."""
    path = output / "lock"
    try:
        lock = open_locked(path, "a+", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"{output}: {path.read_text() or 'another process'} is at work there; waiting for its end")
        lock = open_locked(path, "a+", fcntl.LOCK_EX)
    with lock:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield lock


def _finished(recipe: DownloadRecipe, output: Path) -> dict[str, Any] | None:
    """The sums of a folder in which nothing is missing; None where something is."""
    if not (output / DONE_NAME).exists():
        return None
    sums = read_json(output / DONE_NAME, "delete it, and the same command sums up anew", *SUMS)
    expected = _expected_shards(recipe, output)
    if len(complete_shards(output / "shards", expected)) < expected:
        return None
    say(f"{output}: done already")
    _print(sums)
    return sums


def _fetch(recipe: DownloadRecipe, output: Path, lock: IO[str]) -> dict[str, Any]:
    """Have the missing shards fetched, and write the sums over all."""
    shards, expected = output / "shards", _expected_shards(recipe, output)
    (output / DONE_NAME).unlink(missing_ok=True)
    forget_damaged(shards, expected)
    stats, code = complete_shards(shards, expected), 0
    if len(stats) < expected:
        command = tool_command(find_uv())
        pictures = sum(_row_counts(output / "rows"))
        say(f"Fetching {pictures:,} pictures into {expected:,} shards; {len(stats):,} are there already")
        code = run_tool(command, recipe, output, lock)
        stats = complete_shards(shards, expected)
    if len(stats) < expected:
        raise DownloadStopped(
            f"{output}: {len(stats)} of {expected} shards are complete; {TOOL} ended with exit code {code}, "
            "its last lines say why. The same command goes on from there."
        )
    sums = sum_up(stats, _begun(recipe, output) or 0)
    with atomic_write(output / DONE_NAME) as file:
        file.write(json.dumps(sums, indent=1) + "\n")
    _print(sums)
    return sums


def _write_rows(recipe: DownloadRecipe, folder: Path) -> int:
    """Write the rows as the tool takes them; how many were left out, having no http(s) address."""
    import duckdb
    import pyarrow.parquet as pq

    source = f"read_parquet({sql_text(recipe.rows)})"
    with duckdb.connect(config={"memory_limit": "2GB"}) as connection:
        try:
            names = {row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{recipe.rows} cannot be read as kept rows ({reason})") from None
        absent = {"url", "caption", *(("sha256",) if recipe.verify_sha256 else ())} - names
        if absent:
            raise DataError(f"{recipe.rows} lacks the columns {', '.join(sorted(absent))}")
        web = "regexp_matches(coalesce(url, ''), '^(?i:https?)://[^/]')"
        counts = f"SELECT count(*), count(*) FILTER ({web}) FROM {source}"
        [(total, usable)] = connection.execute(counts).fetchall()
        if not usable:
            raise DataError(f"{recipe.rows} has no row with an http:// or https:// address")
        wanted = ["url", "caption", *_carried(connection, source, names)]
        wanted += ["sha256"] if recipe.verify_sha256 else []
        columns = ", ".join(sql_name(name) for name in wanted)
        batches = connection.sql(f"SELECT {columns} FROM {source} WHERE {web}").to_arrow_reader()
        # Whole shards in a file: the tool begins a new one with each.
        per_file = max(1, ROWS_PER_FILE // recipe.samples_per_shard) * recipe.samples_per_shard
        for number, table in enumerate(_tables_of(batches, per_file)):
            pq.write_table(table, folder / f"{number:05d}.parquet")
    return int(total - usable)


def _tables_of(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Arrow batches as tables of exactly `rows` rows; the last one has the rest."""
    import pyarrow as pa

    waiting, count = list[Any](), 0
    for batch in batches:
        while len(batch):
            part = batch.slice(0, rows - count)
            batch = batch.slice(len(part))
            waiting.append(part)
            count += len(part)
            if count == rows:
                yield pa.Table.from_batches(waiting)
                waiting, count = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def _carried(connection: Any, source: str, names: set[str]) -> list[str]:
    """Identities and scores that any row has: they travel in each picture's json."""
    known = [name for name in ("uid", "hash", *SCORES) if name in names]
    counts = ", ".join(f"count({name})" for name in known)
    found = connection.execute(f"SELECT count(*), {counts} FROM {source}" if known else "SELECT 0").fetchall()
    return [name for name, count in zip(known, found[0][1:], strict=True) if count]


def _expected_shards(recipe: DownloadRecipe, output: Path) -> int:
    return sum(math.ceil(rows / recipe.samples_per_shard) for rows in _row_counts(output / "rows"))


def _row_counts(folder: Path) -> list[int]:
    import pyarrow.parquet as pq

    return [pq.ParquetFile(path).metadata.num_rows for path in sorted(folder.glob("*.parquet"))]


def _print(sums: dict[str, Any]) -> None:
    rows = max(1, sums["rows"])
    say(
        f"{sums['success']:,} of {sums['rows']:,} pictures fetched ({sums['success'] / rows:.1%}), "
        f"{sums['failed_to_download']:,} failed to download, {sums['failed_to_resize']:,} to decode; "
        f"{sums['without_web_address']:,} rows had no web address"
    )
    for reason, count in list(sums["reasons"].items())[:REASONS_SHOWN]:
        say(f"  {count:>12,}  {reason}")
