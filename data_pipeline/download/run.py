"""`bitdance data download`: prepares the rows, runs img2dataset on them, sums up what it reports.

    OUTPUT/rows/NNNNN.parquet     what is asked for: addresses, captions, identities, scores
    OUTPUT/shards/NNNNN.tar, .parquet, _stats.json     img2dataset's, a tar per `samples_per_shard` rows
    OUTPUT/download.json          the sums; written once every row is accounted for
    OUTPUT/recipe.json, settings.json
    OUTPUT/rows.json     of which version of the rows file `rows/` was made, and what of it was left out

img2dataset needs older libraries than ours, so uv runs it in an environment of its own. A shard is complete
when its `_stats.json` is there, and the tool passes over complete ones: the same command goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.ingest.storage import file_version
from data_pipeline.metadata.schema import SCORES, sql_name, sql_text
from data_pipeline.recipe_folder import RECORD_NAME, check_inputs, claim_folder, recipe_record
from foundation.errors import DataError, ExitCode, RecipeError, UserError
from foundation.files import atomic_write, commit_folder
from foundation.json_files import read_json
from foundation.partials import partial_path
from foundation.progress import say
from foundation.provenance import package_version

TOOL = "img2dataset==1.47.0"
DONE_NAME = "download.json"
ROWS_NAME = "rows.json"
STATS = ("status_dict", "count", "successes", "failed_to_download", "failed_to_resize", "duration")
SUMS = ("rows", "without_web_address", "success", "failed_to_download", "failed_to_resize", "reasons")
AGENT_TOKEN = "bitdance"
OPT_OUT = ["noai", "noimageai", "noindex", "noimageindex"]
ROWS_PER_FILE = 1_000_000  # the tool reads a whole file of rows into memory
REASONS_SHOWN = 12
SECRETS = ("AWS_", "WANDB_", "HF_", "HUGGING")  # of the environment: the tool has no use for them


class DownloadStopped(UserError):
    """The tool ended before every row was accounted for; the same command goes on."""

    exit_code = ExitCode.REQUEUE


def run_download(recipe: DownloadRecipe) -> dict[str, Any]:
    """Fetch what is missing of the recipe's rows; the sums over all shards.

    Raises:
        RecipeError: uv is not there, or the output belongs to another recipe, or to rows that were replaced.
        DataError: the rows cannot be used, or not a single picture could be fetched.
        DownloadStopped: shards are missing after the tool has ended.
    """
    output = Path(recipe.output)
    done = claim_folder(output, recipe, DONE_NAME, frozenset({"compute"}))
    begun = _begun(recipe, output)
    if done:
        say(f"{output}: done already")
        sums = read_json(output / DONE_NAME, "delete it, and the same command sums up anew", *SUMS)
        _print(sums)
        return sums
    uv = find_uv()
    skipped = (begun or _begin(recipe, output))["without_web_address"]
    sizes = _row_counts(output / "rows")
    expected = sum(math.ceil(rows / recipe.samples_per_shard) for rows in sizes)
    say(f"Fetching {sum(sizes):,} pictures into {expected:,} shards")
    code = _run_tool(uv, recipe, output)
    parts = sorted((output / "shards").glob("*_stats.json"))
    stats = [
        read_json(part, "delete it, and the same command fetches its shard again", *STATS) for part in parts
    ]
    if len(stats) < expected:
        raise DownloadStopped(
            f"{output}: {len(stats)} of {expected} shards are complete; {TOOL} ended with exit code {code}, "
            "its last lines say why. The same command goes on from there."
        )
    sums = sum_up(stats, skipped)
    with atomic_write(output / DONE_NAME) as file:
        file.write(json.dumps(sums, indent=1) + "\n")
    _print(sums)
    if not sums["success"]:
        raise DataError(f"{output}: not a single picture could be fetched; the table above says why")
    return sums


def find_uv() -> str:
    """The program uv, on the path or beside this Python; RecipeError where it is not."""
    beside = Path(sys.executable).with_name("uv")
    found = shutil.which("uv") or (str(beside) if beside.exists() else None)
    if found is None:
        raise RecipeError(
            f"uv is not installed, and {TOOL} runs in an environment that it makes: pip install uv"
        )
    return found


def tool_command(uv: str) -> list[str]:
    """The Python of the tool's own environment, which uv makes on first use."""
    # -I: neither this folder nor the environment's variables add anything to what the tool imports.
    return [uv, "tool", "run", "--python", sys.executable, "--from", TOOL, "python", "-I"]


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


def _begun(recipe: DownloadRecipe, output: Path) -> dict[str, Any]:
    """The `rows.json` of a folder that was begun; empty where there is none. FolderTaken: of other rows."""
    if not (output / RECORD_NAME).exists():
        return {}
    begun = read_json(output / ROWS_NAME, f"remove {output} and start over", "without_web_address", "version")
    if os.path.exists(recipe.rows):  # if not, nothing has taken its place, and `rows/` is all that is needed
        check_inputs(output, {recipe.rows: begun["version"]}, {recipe.rows: file_version(recipe.rows)})
    return begun


def _begin(recipe: DownloadRecipe, output: Path) -> dict[str, Any]:
    """Make the output folder with the recipe and the rows, whole or not at all; its `rows.json`."""
    partial = partial_path(output)
    (partial / "rows").mkdir(parents=True)
    try:
        version = file_version(recipe.rows)
        begun = {"version": version, "without_web_address": _write_rows(recipe, partial / "rows")}
        (partial / ROWS_NAME).write_text(json.dumps(begun) + "\n")
        (partial / RECORD_NAME).write_text(recipe_record(recipe))
        commit_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return begun


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


def _row_counts(folder: Path) -> list[int]:
    import pyarrow.parquet as pq

    return [pq.ParquetFile(path).metadata.num_rows for path in sorted(folder.glob("*.parquet"))]


def _run_tool(uv: str, recipe: DownloadRecipe, output: Path) -> int:
    import pyarrow.parquet as pq

    columns = pq.ParquetFile(next((output / "rows").glob("*.parquet"))).schema_arrow.names
    carried = [name for name in columns if name not in ("url", "caption", "sha256")]
    version = package_version("bitdance-trainer") or "0"
    settings = {
        "user_agent": f"Mozilla/5.0 (compatible; {AGENT_TOKEN}/{version}; +{recipe.polite.contact})",
        "agent_token": AGENT_TOKEN,
        "respect_opt_out": recipe.polite.respect_opt_out,
        "private_addresses": recipe.polite.private_addresses,
        "max_bytes": int(recipe.limits.max_megabytes * 1e6),
        "total_seconds": recipe.limits.total_seconds,
        "arguments": tool_arguments(recipe, output, carried),
    }
    with atomic_write(output / "settings.json") as file:
        file.write(json.dumps(settings, indent=1) + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
    guard = Path(__file__).with_name("guard.py")
    command = [*tool_command(uv), str(guard), str((output / "settings.json").absolute())]
    return subprocess.run(command, env=environment, check=False).returncode


def tool_arguments(recipe: DownloadRecipe, output: Path, carried: list[str]) -> dict[str, Any]:
    """Arguments of img2dataset's `download`."""
    return {
        "url_list": str((output / "rows").absolute()),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": carried or None,
        "verify_hash": ["sha256", "sha256"] if recipe.verify_sha256 else None,
        "compute_hash": "sha256",
        "output_folder": str((output / "shards").absolute()),
        "output_format": "webdataset",
        "number_sample_per_shard": recipe.samples_per_shard,
        "image_size": recipe.pictures.side,
        "resize_mode": recipe.pictures.resize,
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_quality": recipe.pictures.quality,
        "min_image_size": recipe.pictures.min_side,
        "timeout": recipe.limits.stall_seconds,
        "retries": recipe.limits.retries,
        "user_agent_token": AGENT_TOKEN,
        "disallowed_header_directives": OPT_OUT if recipe.polite.respect_opt_out else [],
        "processes_count": recipe.compute.processes,
        "thread_count": recipe.compute.threads,
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }


def _print(sums: dict[str, Any]) -> None:
    rows = max(1, sums["rows"])
    say(
        f"{sums['success']:,} of {sums['rows']:,} pictures fetched ({sums['success'] / rows:.1%}), "
        f"{sums['failed_to_download']:,} failed to download, {sums['failed_to_resize']:,} to decode; "
        f"{sums['without_web_address']:,} rows had no web address"
    )
    for reason, count in list(sums["reasons"].items())[:REASONS_SHOWN]:
        say(f"  {count:>12,}  {reason}")
