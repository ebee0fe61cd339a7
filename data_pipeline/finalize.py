"""`bitdance data finalize`: the tasks' folders become one dataset. No shard is copied or rewritten.

1. near-duplicates over all tasks, by the perceptual hashes that the tasks recorded: left out of the side
index; 2. `index.json` over all shards, and the side index of each class; 3. `manifest.json`, last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any, cast

import duckdb
import numpy as np
from numpy.typing import NDArray

from data_pipeline.ingest.storage import is_remote, open_stream, remote_files
from data_pipeline.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest
from data_pipeline.metadata.engine import explaining
from data_pipeline.metadata.recipe import memory_limit
from data_pipeline.metadata.schema import sql_list
from data_pipeline.near_duplicates import find_near_duplicates
from data_pipeline.recipe_folder import RECORD_NAME, recipe_of_record
from data_pipeline.side_index import INDEX_NAME, table_address, write_side_index
from data_pipeline.store import remove_scratch, writing_to
from data_pipeline.tokenize.decoding import HASH_DEFINITION
from data_pipeline.tokenize.folder import TASKS, DatasetFolder, Plan
from data_pipeline.tokenize.marker import (
    Marker,
    changed_files,
    counts_in_words,
    file_entries,
    some_of,
    total_counts,
    without_samples,
)
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.errors import DataError, Problems, RecipeError
from foundation.progress import say, track
from foundation.provenance import package_version
from foundation.recipes import recipe_hash

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
        RecipeError: `memory` is no amount of memory.
        DataError: no dataset there, tasks that are missing or damaged, or no sample in any of them.
        PlaceUnusable: its disk is full, or cannot be written.
    """
    try:
        memory_limit(memory)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from None
    with writing_to(output):
        return _finalize(DatasetFolder(output), memory)


def _finalize(folder: DatasetFolder, memory: str) -> Manifest:
    recipe, plan = read_begun(folder)
    finished = None if folder.damaged() else _finished(folder, recipe)
    if finished is not None:
        folder.sweep()
        say(f"{folder.root}: finished already, {_totals(finished)}")
        return finished
    markers = _markers(folder, plan)
    _check_tables(folder, plan, markers)
    if recipe.near_duplicates is not None:
        _check_comparable(folder, markers)
    dropped = _near_duplicates(folder, sorted(markers), recipe, memory)
    manifest = _write(folder, recipe, plan, markers, dropped)
    folder.sweep()
    _report(folder, manifest, markers)
    return manifest


def read_begun(folder: DatasetFolder) -> tuple[TokenizeRecipe, Plan]:
    """Recipe and plan of a dataset; DataError where none has been begun, or one of them is damaged."""
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
    return manifest if intact and manifest.recipe_sha256 == recipe_sha256(recipe) else None


def _matches(address: str, entry: FileEntry) -> bool:
    try:
        with open_stream(address) as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest() == entry.sha256
    except DataError:
        return False


def recipe_sha256(recipe: TokenizeRecipe) -> str:
    """The recipe's hash, as the manifest has it: how the work was done is not in it."""
    return recipe_hash(recipe, {"compute"})


def _markers(folder: DatasetFolder, plan: Plan) -> dict[int, Marker]:
    """The markers of all tasks but those that were given up."""
    found = folder.markers(range(len(plan.shards)))
    given_up = folder.given_up()
    absent = [n for n in range(len(plan.shards)) if n not in found and n not in given_up]
    if absent:
        raise DataError(
            f"{folder.root}: {len(absent)} of {len(plan.shards)} tasks are not done ({some_of(absent)}); "
            "run `bitdance data tokenize` again, and see `bitdance data status`"
        )
    if not any(marker["classes"] for marker in found.values()):
        counts = counts_in_words(total_counts(found), folder.quarantines)
        raise DataError(
            f"{folder.root}: no task holds a sample: {counts}. Mend the shards or the recipe, "
            f"remove {folder.root}, and run `bitdance data tokenize` again"
        )
    return found


def _check_tables(folder: DatasetFolder, plan: Plan, markers: dict[int, Marker]) -> None:
    """DataError where the small files, which the side index is made of, are not what tasks wrote."""
    problems = Problems()
    for number in track(sorted(markers), "Checking the tasks' tables"):
        if changed := changed_files(folder.store, folder.task(number), markers[number]):
            said = "; ".join(f"{name}: {what}" for name, what in changed.items())
            folder.note_damage(number, plan.shards[number], said)
        for name, what in changed.items():
            problems.add(folder.address(name), what)
    mend = "`bitdance data tokenize` with its recipe makes bad tasks anew"
    problems.raise_if_any(DataError, f"{folder.root} cannot be finished; {mend}")


def _check_comparable(folder: DatasetFolder, markers: dict[int, Marker]) -> None:
    """DataError where the tasks' perceptual hashes are not all by one definition."""
    if len({marker.get("perceptual_hash") for marker in markers.values()}) > 1:
        old = [n for n, marker in markers.items() if marker.get("perceptual_hash") != HASH_DEFINITION]
        raise DataError(
            f"{folder.root}: {len(old)} tasks ({some_of(old)}) were done by another version of this "
            f"software, whose perceptual hashes cannot be compared with the others'; remove their folders in "
            f"{folder.address(TASKS)}, and run `bitdance data tokenize` again"
        )


def _near_duplicates(
    folder: DatasetFolder, numbers: list[int], recipe: TokenizeRecipe, memory: str
) -> dict[int, NDArray[np.int64]]:
    """Task -> numbers of its pictures that are left out, sorted."""
    if recipe.near_duplicates is None:
        return {}
    spill = folder.store.scratch("near-duplicates")
    files = sql_list([table_address(folder, number) for number in numbers])
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


def _write(
    folder: DatasetFolder,
    recipe: TokenizeRecipe,
    plan: Plan,
    markers: dict[int, Marker],
    dropped: dict[int, NDArray[np.int64]],
) -> Manifest:
    working = folder.store.scratch("side")
    try:
        classes, shards = write_side_index(folder, recipe.classes, sorted(markers), dropped, working)
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
        recipe_sha256=recipe_sha256(recipe),
        tokenizer=plan.tokenizer,
        text_tokenizer=plan.text_tokenizer,
        classes=[c.model_copy(update={"side": f"{name}/{c.resolution}"}) for c in classes],
        tasks=len(plan.shards),
        given_up=sorted(set(range(len(plan.shards))) - set(markers)),
        quarantined=total_counts(markers)["refused"],
        near_duplicates=sum(c.raw_samples - c.samples for c in classes),
        files={path: FileEntry(**entry) for path, entry in sorted(named.items())},
    )
    folder.store.write(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _totals(manifest: Manifest) -> str:
    return ", ".join(f"{c.samples:,} samples of class {c.resolution}" for c in manifest.classes)


def _report(folder: DatasetFolder, manifest: Manifest, markers: dict[int, Marker]) -> None:
    if manifest.given_up:
        say(f"{len(manifest.given_up):,} of {manifest.tasks:,} tasks were given up")
    if empty := without_samples(markers):
        say(empty)
    say(counts_in_words(total_counts(markers), folder.quarantines))
    say(f"{_totals(manifest)}; {manifest.near_duplicates:,} near-duplicate records left out")
