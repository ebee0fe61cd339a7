"""`bitdance data verify`: does a finished dataset hold what its manifest says?

Every file is hashed against the manifest, the index or its task's marker (which ends in its own hash), counts
are added up, and every shard's header is checked against its length. With `deep`, records spread over each
shard are read and unpacked as well. What is found of a task is noted in the dataset, so that `bitdance data
tokenize` does the task again; and forgotten, where a whole copy was put back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_pipeline.finalize import read_begun, recipe_sha256
from data_pipeline.ingest.storage import StoreUnreachable, is_remote, open_stream
from data_pipeline.manifest import MANIFEST_NAME, ClassManifest, Manifest, parse_manifest
from data_pipeline.recipe_folder import RECORD_NAME
from data_pipeline.records import LATENT_COLUMNS, LatentRecord, unpack_bits
from data_pipeline.store import PlaceUnusable, not_readable, writing_to
from data_pipeline.tokenize.folder import DAMAGED, PLAN_NAME, TASKS, DatasetFolder, Plan
from data_pipeline.tokenize.marker import CHANGED, DONE_NAME, SHARD_SUFFIX, changed_files
from foundation.errors import DataError, Problems
from foundation.progress import say, track

DEEP_RECORDS = 32  # records read from each shard
TASK_OF = re.compile(TASKS + "/([0-9]{5,})/")
TaskProblems = defaultdict[int, Problems]


def verify_dataset(dataset: str | Path, deep: bool = False) -> None:
    """Check a finished dataset.

    Raises:
        DataError: it is not finished, or whatever is wrong with it: every bad file is named.
    """
    folder = DatasetFolder(dataset)
    root = folder.root
    text = folder.store.read(MANIFEST_NAME)
    if text is None:
        raise DataError(
            f"{root} has no {MANIFEST_NAME}: it is not finished (`bitdance data status` says why)"
        )
    manifest = parse_manifest(text, folder.address(MANIFEST_NAME))
    plan = _check_begun(manifest, folder)
    problems = Problems()
    for name, entry in track(manifest.files.items(), "Checking the index", len(manifest.files)):
        _check_file(folder.address(name), entry.bytes, entry.sha256, problems)
    problems.raise_if_any(DataError, f"{root} does not verify; `bitdance data finalize` mends its index")
    shards = json.loads(folder.store.read("index.json") or b"{}")["shards"]
    _check_counts(manifest, shards, folder, problems)
    tasks: TaskProblems = defaultdict(Problems)
    seen = folder.store.files(TASKS)
    _check_tasks(manifest, plan, shards, folder, tasks)
    for place, shard in enumerate(track(shards, "Checking shards")):
        found = TASK_OF.match(shard["raw_data"]["basename"])
        own = tasks[int(found[1])] if found else problems
        _check_shard(folder, shard, _class_of(manifest, place), manifest, deep, own)
    bad = {number: own for number, own in sorted(tasks.items()) if own.lines}
    noted = _note(folder, plan, bad, seen)
    problems.lines += [line for own in bad.values() for line in own.lines]
    problems.raise_if_any(DataError, f"{root} does not verify; {noted}")
    say(f"{root}: {len(shards):,} shards and {sum(c.samples for c in manifest.classes):,} samples verify")


def _check_begun(manifest: Manifest, folder: DatasetFolder) -> Plan:
    """The plan; DataError where it or the recipe are not those that the dataset was finished with."""
    recipe, plan = read_begun(folder)
    problems = Problems()
    if recipe_sha256(recipe) != manifest.recipe_sha256:
        problems.add(folder.address(RECORD_NAME), "is not the recipe that the dataset was made with")
    planned = (len(plan.shards), plan.tokenizer, plan.text_tokenizer)
    if planned != (manifest.tasks, manifest.tokenizer, manifest.text_tokenizer):
        problems.add(folder.address(PLAN_NAME), "is not the plan that the dataset was made by")
    problems.raise_if_any(DataError, f"{folder.root} does not verify; put back a copy of these files")
    return plan


def _note(
    folder: DatasetFolder, plan: Plan, bad: dict[int, Problems], seen: dict[str, tuple[int, float]]
) -> str:
    """Note in the dataset which tasks are bad, and which are not any more; how the bad ones are mended. One
    that was made anew since its files were `seen` is another task, of which nothing is known."""
    try:
        with writing_to(folder.root):
            for number, own in bad.items():
                marker = f"{folder.task(number)}/{DONE_NAME}"
                if folder.store.files(folder.task(number)).get(marker) == seen.get(marker):
                    folder.note_damage(number, plan.shards[number], "; ".join(map(str.strip, own.lines)))
            for number in sorted(set(folder.damaged()) - set(bad)):
                folder.forget(number, DAMAGED)
    except (PlaceUnusable, StoreUnreachable) as error:
        return (
            "`bitdance data tokenize` with its recipe makes bad tasks anew once it knows of them, but that "
            f"could not be noted in the dataset ({error}): verify it where it may be written, or remove the "
            "bad tasks' folders"
        )
    return "`bitdance data tokenize` with its recipe makes bad tasks anew"


def _check_file(address: str, size: int, sha256: str, problems: Problems) -> bool:
    try:
        with open_stream(address) as stream:
            found = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
            read = stream.tell()
    except DataError:
        problems.add(address, "is missing")
        return False
    except OSError as error:
        problems.add(address, not_readable(error))
        return False
    if read != size:
        problems.add(address, f"has {read:,} bytes, expected {size:,}")
    elif found != sha256:
        problems.add(address, CHANGED)
    return (read, found) == (size, sha256)


def _check_counts(
    manifest: Manifest, shards: list[dict[str, Any]], folder: DatasetFolder, problems: Problems
) -> None:
    if sum(c.shards for c in manifest.classes) != len(shards):
        problems.add(folder.address("index.json"), f"{len(shards)} shards, the manifest has other numbers")
    for section in manifest.classes:
        own = shards[section.first_shard : section.first_shard + section.shards]
        if sum(shard["samples"] for shard in own) != section.raw_samples:
            problems.add(f"class {section.resolution}", "its shards hold another number of samples")
        sizes = {
            name: len(np.load(folder.store.local(f"{section.side}/{name}.npy"), "r", allow_pickle=False))
            for name in ("n_text", "bucket", "shard_sizes", "dropped")
        }
        expected = {
            "n_text": section.samples,
            "bucket": section.samples,
            "shard_sizes": section.shards,
            "dropped": section.raw_samples - section.samples,
        }
        if sizes != expected:
            problems.add(f"class {section.resolution}", f"its side index has lengths {sizes}, not {expected}")


def _check_tasks(
    manifest: Manifest,
    plan: Plan,
    shards: list[dict[str, Any]],
    folder: DatasetFolder,
    tasks: TaskProblems,
) -> None:
    """Each task's marker against manifest and index, and its small files; its shards come afterwards."""
    numbers = [number for number in range(manifest.tasks) if number not in set(manifest.given_up)]
    unreadable = dict[str, str]()
    markers = folder.claims(numbers, unreadable)
    indexed: dict[str, dict[str, str]] = defaultdict(dict)
    for shard in shards:
        raw = shard["raw_data"]
        indexed["/".join(raw["basename"].split("/")[:2])][raw["basename"]] = raw["hashes"]["sha256"]
    for number in track(numbers, "Checking tasks"):
        marker, task, problems = markers.get(number), folder.task(number), tasks[number]
        address = folder.address(task)
        if marker is None:
            name = f"{task}/{DONE_NAME}"
            problems.add(folder.address(name), unreadable.get(name, "is missing or damaged"))
            continue
        files = {f"{task}/{name}": entry["sha256"] for name, entry in marker["files"].items()}
        if marker["shard"] != plan.shards[number].label:
            problems.add(address, "another input shard than the plan's was read for it")
        if marker["fingerprint"] != manifest.tokenizer.fingerprint:
            problems.add(address, "another tokenizer made it")
        if marker["text_hash"] != manifest.text_tokenizer.sha256:
            problems.add(address, "another text tokenizer counted its captions")
        if {name: digest for name, digest in files.items() if name.endswith(SHARD_SUFFIX)} != indexed[task]:
            problems.add(address, "its marker has other shards than the dataset's index")
        for name, what in changed_files(folder.store, task, marker).items():
            problems.add(folder.address(name), what)


def _class_of(manifest: Manifest, shard: int) -> ClassManifest:
    return next(c for c in reversed(manifest.classes) if c.first_shard <= shard)


def _check_shard(
    folder: DatasetFolder,
    shard: dict[str, Any],
    section: ClassManifest,
    manifest: Manifest,
    deep: bool,
    problems: Problems,
) -> None:
    raw = shard["raw_data"]
    path = folder.address(raw["basename"])
    if not _check_file(path, raw["bytes"], raw["hashes"]["sha256"], problems):
        return
    encodings = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if encodings != LATENT_COLUMNS:
        problems.add(path, f"its columns are {encodings}, expected {LATENT_COLUMNS}")
        return
    if not _header_fits(path, shard["samples"], raw["bytes"]):
        problems.add(path, "its header does not fit its length")
    elif deep:
        _check_records(folder, shard, section, manifest, problems)


def _header_fits(path: str, samples: int, size: int) -> bool:
    """Whether a shard's header has that many records, each with a length, the last up to the shard's end."""
    with open_stream(path) as stream:
        header = stream.read(4 * (samples + 2))
    if len(header) < 4 * (samples + 2):
        return False
    count, *offsets = np.frombuffer(header, "<u4").astype(np.int64)
    return bool(count == samples and offsets[-1] == size and np.all(np.diff(offsets) > 0))


def _check_records(
    folder: DatasetFolder,
    shard: dict[str, Any],
    section: ClassManifest,
    manifest: Manifest,
    problems: Problems,
) -> None:
    from data_pipeline.streaming_import import MDSReader

    name = shard["raw_data"]["basename"]
    path = folder.store.local(name)
    reader = MDSReader.from_json(str(path).removesuffix(name), "", dict(shard))
    side = manifest.tokenizer.downsample
    grids = {(height // side, width // side) for height, width in section.buckets}
    for place in np.unique(np.linspace(0, shard["samples"] - 1, DEEP_RECORDS).astype(int)):
        where = f"{folder.address(name)}, record {place}"
        try:
            record = LatentRecord.from_mds(reader[int(place)])
            unpack_bits(record.bits, record.h, record.w, manifest.tokenizer.bits_per_token)
        except (ValueError, KeyError) as error:
            problems.add(where, str(error))
            continue
        if (record.h, record.w) not in grids:
            problems.add(where, f"a grid of {record.h} x {record.w} tokens, which is no bucket of its class")
    if is_remote(folder.root):
        path.unlink()  # a copy: all of them would be the whole dataset
