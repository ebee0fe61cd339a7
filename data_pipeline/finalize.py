"""`bitdance data finalize`: the tasks' folders become one dataset. No shard is copied or rewritten.

1. near-duplicates over all tasks, by the perceptual hashes that the tasks recorded: left out of the side
index; 2. `index.json` over all shards, and the side index of each class; 3. `manifest.json`, last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
from numpy.typing import NDArray

from data_pipeline.ingest.storage import is_remote, open_stream, remote_files
from data_pipeline.manifest import MANIFEST_NAME, ClassManifest, FileEntry, Manifest, parse_manifest
from data_pipeline.metadata.engine import explaining
from data_pipeline.metadata.schema import sql_list
from data_pipeline.near_duplicates import find_near_duplicates
from data_pipeline.npy_stream import NpyStream
from data_pipeline.recipe_folder import RECORD_NAME, recipe_of_record
from data_pipeline.store import remove_scratch, writing_to
from data_pipeline.tokenize.decoding import HASH_DEFINITION
from data_pipeline.tokenize.folder import QUARANTINE_NAME, TASKS, DatasetFolder, Plan, file_entries
from data_pipeline.tokenize.recipe import ClassSection, TokenizeRecipe
from foundation.errors import DataError
from foundation.json_files import parse_json
from foundation.progress import say, track
from foundation.provenance import package_version
from foundation.recipes import recipe_hash

INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.parquet"
# A picture's rank packs (resolution, task, number in the task) into 64 bits: larger pictures are better, then
# earlier ones.
TASK_BITS, PICTURE_BITS = 24, 24
LARGEST_SIDE = (1 << (64 - TASK_BITS - PICTURE_BITS)) - 1


def finalize_dataset(output: str, memory: str = "4GB") -> Manifest:
    """Finish the dataset in `output`; where it is finished already, its manifest.

    Args:
        output: the dataset's folder.
        memory: DuckDB's limit while near-duplicates are looked for.

    Raises:
        DataError: no dataset there, tasks that are missing, or no sample in any of them.
        PlaceUnusable: its disk is full, or cannot be written.
    """
    with writing_to(output):
        return _finalize(DatasetFolder(output), memory)


def _finalize(folder: DatasetFolder, memory: str) -> Manifest:
    recipe, plan = _read(folder)
    finished = _finished(folder, recipe)
    if finished is not None:
        folder.sweep()
        say(f"{folder.root}: finished already, {_totals(finished)}")
        return finished
    markers = _markers(folder, plan)
    if recipe.near_duplicates is not None:
        _check_comparable(folder, markers)
    dropped = _near_duplicates(folder, sorted(markers), recipe, memory)
    manifest = _write(folder, recipe, plan, markers, dropped)
    folder.sweep()
    _report(folder, manifest, markers)
    return manifest


def _read(folder: DatasetFolder) -> tuple[TokenizeRecipe, Plan]:
    record, plan = folder.store.read(RECORD_NAME), folder.read_plan()
    if plan is None or record is None:
        raise DataError(f"{folder.root} holds no dataset that `bitdance data tokenize` has begun")
    return recipe_of_record(TokenizeRecipe, record, folder.address(RECORD_NAME)), plan


def _finished(folder: DatasetFolder, recipe: TokenizeRecipe) -> Manifest | None:
    text = folder.store.read(MANIFEST_NAME)
    if text is None:
        return None
    try:
        manifest = parse_manifest(text, folder.address(MANIFEST_NAME))
    except DataError:
        return None
    intact = all(_matches(folder.address(name), entry) for name, entry in manifest.files.items())
    return manifest if intact and manifest.recipe_sha256 == _recipe_hash(recipe) else None


def _matches(address: str, entry: FileEntry) -> bool:
    try:
        with open_stream(address) as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest() == entry.sha256
    except DataError:
        return False


def _recipe_hash(recipe: TokenizeRecipe) -> str:
    return recipe_hash(recipe, {"compute"})


def _markers(folder: DatasetFolder, plan: Plan) -> dict[int, dict[str, Any]]:
    """The markers of all tasks but those that were given up."""
    found = folder.markers(range(len(plan.shards)))
    given_up = folder.given_up()
    absent = [n for n in range(len(plan.shards)) if n not in found and n not in given_up]
    if absent:
        raise DataError(
            f"{folder.root}: {len(absent)} of {len(plan.shards)} tasks are not done ({_some(absent)}); "
            "run `bitdance data tokenize` again, and see `bitdance data status`"
        )
    if not any(marker["classes"] for marker in found.values()):
        raise DataError(f"{folder.root}: the tasks hold no sample; {_counts_in_words(folder, found)}")
    return found


def _check_comparable(folder: DatasetFolder, markers: dict[int, dict[str, Any]]) -> None:
    """DataError where the tasks' perceptual hashes are not all by one definition."""
    if len({marker.get("perceptual_hash") for marker in markers.values()}) > 1:
        old = [n for n, marker in markers.items() if marker.get("perceptual_hash") != HASH_DEFINITION]
        raise DataError(
            f"{folder.root}: {len(old)} tasks ({_some(old)}) were done by another version of this software, "
            f"whose perceptual hashes cannot be compared with the others'; remove their folders in "
            f"{folder.address(TASKS)}, and run `bitdance data tokenize` again"
        )


def _some(numbers: list[int]) -> str:
    return ", ".join(f"{number:05d}" for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")


def _near_duplicates(
    folder: DatasetFolder, numbers: list[int], recipe: TokenizeRecipe, memory: str
) -> dict[int, NDArray[np.int64]]:
    """Task -> numbers of its pictures that are left out, sorted."""
    if recipe.near_duplicates is None:
        return {}
    spill = folder.store.scratch("near-duplicates")
    files = sql_list([_table_address(folder, number) for number in numbers])
    pictures = (
        f"SELECT (({LARGEST_SIDE} - max(resolution))::UBIGINT << {TASK_BITS + PICTURE_BITS}) "
        f"| (task::UBIGINT << {PICTURE_BITS}) | picture::UBIGINT AS rank, any_value(phash) AS phash FROM "
        "(SELECT *, regexp_extract(filename, '([0-9]+)/samples.parquet$', 1)::BIGINT AS task "
        f"FROM read_parquet({files}, filename = true)) GROUP BY task, picture"
    )
    connection = duckdb.connect(config={"memory_limit": memory, "temp_directory": str(spill)})
    query = (
        f"SELECT (rank >> {PICTURE_BITS}) & {(1 << TASK_BITS) - 1} AS task, "
        f"rank & {(1 << PICTURE_BITS) - 1} AS picture FROM losers ORDER BY task, picture"
    )
    try:
        mend = f"`bitdance data verify {folder.root}` says which tasks are damaged"
        with explaining(f"{memory} of memory", str(spill), mend):
            if is_remote(folder.root):
                connection.register_filesystem(remote_files())
            connection.execute(f"CREATE TEMP TABLE pictures AS {pictures}")
            find_near_duplicates(connection, "SELECT * FROM pictures", recipe.near_duplicates, "losers")
            found = connection.execute(query).fetchnumpy()
    finally:
        connection.close()
        remove_scratch(spill)
    tasks, starts = np.unique(found["task"], return_index=True)
    pieces = np.split(found["picture"].astype(np.int64), starts[1:])
    return {int(task): piece for task, piece in zip(tasks, pieces, strict=False)}


@dataclass
class _Position:
    """Where the next shard and the next sample of the whole index stand."""

    shard: int = 0
    sample: int = 0


def _write(
    folder: DatasetFolder,
    recipe: TokenizeRecipe,
    plan: Plan,
    markers: dict[int, dict[str, Any]],
    dropped: dict[int, NDArray[np.int64]],
) -> Manifest:
    working = folder.store.scratch("side")
    try:
        position, shards, classes = _Position(), list[dict[str, Any]](), list[ClassManifest]()
        for section in recipe.classes:
            side = working / str(section.resolution)
            side.mkdir()
            classes.append(_write_class(folder, section, sorted(markers), dropped, side, position, shards))
        entries = file_entries(working)
        name = "side-" + hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:8]
        with contextlib.suppress(FileExistsError):  # named by its content: the same
            folder.store.commit(working, name)
    finally:
        remove_scratch(working)
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
    folder.store.write(INDEX_NAME, index)
    named = {f"{name}/{path}": entry for path, entry in entries.items()}
    named[INDEX_NAME] = {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    if plan.text_tokenizer.inside:
        inside = plan.text_tokenizer.name
        named |= {f"{inside}/{path}": e for path, e in file_entries(folder.store.local(inside)).items()}
    manifest = Manifest(
        code_version=package_version("bitdance-trainer") or "unknown",
        recipe_sha256=_recipe_hash(recipe),
        tokenizer=plan.tokenizer,
        text_tokenizer=plan.text_tokenizer,
        classes=[c.model_copy(update={"side": f"{name}/{c.resolution}"}) for c in classes],
        tasks=len(plan.shards),
        given_up=sorted(set(range(len(plan.shards))) - set(markers)),
        quarantined=_sum_counts(markers)["refused"],
        near_duplicates=sum(c.raw_samples - c.samples for c in classes),
        files={path: FileEntry(**entry) for path, entry in sorted(named.items())},
    )
    folder.store.write(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _write_class(
    folder: DatasetFolder,
    section: ClassSection,
    tasks: list[int],
    dropped: dict[int, NDArray[np.int64]],
    side: Path,
    position: _Position,
    shards: list[dict[str, Any]],
) -> ClassManifest:
    """Write a class's side index and append its shards to the whole index."""
    start = _Position(position.shard, position.sample)
    kept = 0
    with (
        NpyStream(side / "n_text.npy", "<u2") as n_text,
        NpyStream(side / "bucket.npy", "|u1") as bucket,
        NpyStream(side / "shard_sizes.npy", "<u4") as shard_sizes,
        NpyStream(side / "dropped.npy", "<i8") as left_out,
    ):
        for number in track(tasks, f"Indexing class {section.resolution}"):
            own = _task_shards(folder, number, section.resolution)
            if not own:
                continue
            table = _class_samples(folder, number, section.resolution)
            keep = ~np.isin(table["picture"], dropped.get(number, np.empty(0, np.int64)))
            sizes = np.array([shard["samples"] for shard in own])
            if sizes.sum() != len(keep):
                raise DataError(
                    f"{folder.address(folder.task(number))}: its shards and its table of samples disagree"
                )
            shard_of_row = np.repeat(np.arange(len(own)), sizes)
            n_text.append(table["n_text"][keep])
            bucket.append(table["bucket"][keep])
            shard_sizes.append(np.bincount(shard_of_row[keep], minlength=len(own)))
            left_out.append(np.flatnonzero(~keep) + position.sample - start.sample)
            shards += own
            kept += int(keep.sum())
            position.shard += len(own)
            position.sample += len(keep)
    return ClassManifest(
        resolution=section.resolution,
        buckets=section.buckets,
        first_shard=start.shard,
        shards=position.shard - start.shard,
        first_sample=start.sample,
        raw_samples=position.sample - start.sample,
        samples=kept,
        side="",
    )


def _task_shards(folder: DatasetFolder, number: int, resolution: int) -> list[dict[str, Any]]:
    """A task's shards of a class, their base names relative to the dataset."""
    name = f"{folder.task(number)}/{resolution}/{INDEX_NAME}"
    index = folder.store.read(name)
    if index is None:
        return []
    mend = "run `bitdance data tokenize` with its recipe, after removing the task's folder"
    shards = parse_json(index, folder.address(name), mend, "shards")["shards"]
    for shard in shards:
        name = shard["raw_data"]["basename"]
        shard["raw_data"]["basename"] = f"{folder.task(number)}/{resolution}/{name}"
    return list(shards)


def _table_address(folder: DatasetFolder, number: int) -> str:
    return folder.address(f"{folder.task(number)}/{SAMPLES_NAME}")


def _class_samples(folder: DatasetFolder, number: int, resolution: int) -> dict[str, NDArray[Any]]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = ["resolution", "n_text", "bucket", "picture"]
    with open_stream(_table_address(folder, number)) as stream:
        table = pq.read_table(stream, columns=columns)
    table = table.filter(pc.equal(table["resolution"], resolution))
    return {name: table[name].to_numpy() for name in columns[1:]}


def _sum_counts(markers: dict[int, dict[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for marker in markers.values():
        total.update(marker["counts"])
    return total


def _counts_in_words(folder: DatasetFolder, markers: dict[int, dict[str, Any]]) -> str:
    counts = _sum_counts(markers)
    reasons = folder.address(f"{TASKS}/*/{QUARANTINE_NAME}")
    return (
        f"{counts['read']:,} samples read, {counts['not_kept']:,} not kept by the filter, "
        f"{counts['too_small']:,} too small for every class, {counts['refused']:,} refused"
        + (f" (why: {reasons})" if counts["refused"] else "")
    )


def _totals(manifest: Manifest) -> str:
    return ", ".join(f"{c.samples:,} samples of class {c.resolution}" for c in manifest.classes)


def _report(folder: DatasetFolder, manifest: Manifest, markers: dict[int, dict[str, Any]]) -> None:
    if manifest.given_up:
        say(f"{len(manifest.given_up):,} of {manifest.tasks:,} tasks were given up")
    say(_counts_in_words(folder, markers))
    say(f"{_totals(manifest)}; {manifest.near_duplicates:,} near-duplicate records left out")
