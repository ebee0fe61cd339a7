"""`bitdance data tokenize`: checks, plans, does what is missing; finishes the dataset when all is done."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.finalize import finalize_dataset
from data_pipeline.ingest.kept import index_folder, kept_captions, rows_version
from data_pipeline.ingest.samples import RawSample
from data_pipeline.ingest.shards import Shard, list_shards, of_each, read_shard
from data_pipeline.ingest.storage import is_remote
from data_pipeline.ingest.versions import captions_version, has_changed
from data_pipeline.manifest import MANIFEST_NAME, TextTokenizerManifest, TokenizerManifest
from data_pipeline.recipe_folder import RECORD_NAME, claim_folder, recipe_record
from data_pipeline.store import remove_scratch, writing_to
from data_pipeline.tokenize.captions import load_text_tokenizer_or_refuse, text_tokenizer_hash, train_and_save
from data_pipeline.tokenize.encoder import describe_tokenizer
from data_pipeline.tokenize.folder import TASKS, DatasetFolder, Plan, is_of
from data_pipeline.tokenize.marker import Marker
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.errors import DataError, Problems, RecipeError
from foundation.progress import say, track
from foundation.sections import Problem, check, failed_checks

# May differ between runs: they do not change what a task writes.
FREE_KEYS = frozenset({"compute", "max_bad_fraction"})
SLICE = re.compile("[0-9]+/[0-9]+")
TEXT_FOLDER, TEXT_FILE = "text_tokenizer", "tokenizer.json"


class RecipeHere(TokenizeRecipe):
    """A recipe whose checks also look at what it names: it can be carried out here and now."""

    @check
    def _buckets_fit_the_tokenizer(self) -> Iterator[Problem]:
        from models.tokenizer import read_tokenizer_config

        try:
            side = read_tokenizer_config(self.tokenizer).downsample
        except (ValueError, OSError) as error:
            yield "tokenizer", str(error)
            return
        for place, section in enumerate(self.classes):
            for height, width in section.buckets:
                if height % side or width % side:
                    words = f"[{height}, {width}] is not a multiple of {side}, the tokenizer's downsampling"
                    yield f"classes.{place}.buckets", f"{words}; round it to one"

    @check
    def _kept_rows_are_there(self) -> Iterator[Problem]:
        if self.keep and not is_remote(self.keep.rows) and not Path(self.keep.rows).is_file():
            yield "keep.rows", f"{self.keep.rows} does not exist; run `bitdance data filter` first"


@dataclass(frozen=True)
class Slice:
    """The part `index` of `count` of the list of tasks: those whose number is `index` modulo `count`."""

    index: int
    count: int


def run_tokenize(recipe: TokenizeRecipe, part: Slice | None = None) -> None:
    """Do what is missing of the recipe's tasks; finish the dataset once all are done, unless only a slice
    ran.

    Raises:
        RecipeError: the recipe cannot be carried out, or the output belongs to another one.
        DataError: no input, or tasks that failed; the other tasks are done all the same.
        PlaceUnusable: the output's disk is full, or cannot be written.
    """
    with writing_to(recipe.output):
        _run(recipe, part)


def _run(recipe: TokenizeRecipe, part: Slice | None) -> None:
    _check(recipe)
    kept = rows_version(recipe.keep) if recipe.keep else None  # refuses rows that are damaged, too
    tokenizer = describe_tokenizer(recipe)
    folder = DatasetFolder(recipe.output)
    claim_folder(recipe.output, recipe, MANIFEST_NAME, FREE_KEYS)
    plan, moved = _plan(recipe, folder, tokenizer, kept)
    folder.sweep()
    numbers = range(len(plan.shards)) if part is None else range(part.index, len(plan.shards), part.count)
    missing, failed, changed = _missing(recipe, folder, plan, numbers, moved)
    if missing:
        say(f"{recipe.output}: {len(missing)} of {len(numbers)} tasks to do")
        folder.reopen()
        failed |= _do(recipe, plan, missing)
    else:
        say(f"{recipe.output}: all {len(numbers)} tasks were done already")
    problems = []
    if failed:
        problems.append(
            f"{len(failed)} of {len(numbers)} tasks failed, the others are done:\n{_lines(failed)}\n"
            f"Mend what is wrong, then `bitdance data retry {recipe.output}` and the same command again. To "
            f"go on without a shard: `bitdance data retry {recipe.output} --give-up {min(failed)}`. All "
            f"reasons are in {folder.address('failed')}."
        )
    if changed:
        problems.append(
            f"{len(changed)} tasks were done with another content of their shards:\n"
            f"{_lines(changed)}\nPut the shards back as they were; or remove these tasks' folders in "
            f"{folder.address(TASKS)}, and the same command does them anew."
        )
    if problems:
        raise DataError("\n".join(problems))
    if part is None:
        finalize_dataset(recipe.output)


def _check(recipe: TokenizeRecipe) -> None:
    problems = Problems()
    for location, problem in failed_checks(RecipeHere.model_construct(**dict(recipe))):
        problems.add(".".join(map(str, location)), problem)
    problems.raise_if_any(RecipeError, "The tokenize recipe cannot be carried out")


def _plan(
    recipe: TokenizeRecipe, folder: DatasetFolder, tokenizer: TokenizerManifest, kept: str | None
) -> tuple[Plan, set[int]]:
    """The plan of the first run, after checking that it still holds, and the tasks whose shards the first run
    listed otherwise; this run's where there is none."""
    shards, captions = list_shards(recipe.input), captions_version(recipe.input)
    plan = folder.read_plan()
    if plan is None:
        name, text = _text_tokenizer(recipe, folder, shards)
        plan = Plan(
            shards=tuple(shards),
            tokenizer=tokenizer,
            text_tokenizer=TextTokenizerManifest(
                name=name,
                inside=recipe.text_tokenizer.train is not None,
                vocab_size=len(text),
                sha256=text_tokenizer_hash(text),
            ),
            kept=kept,
            captions=captions,
        )
        folder.write_plan(plan)
        return plan, set()
    if plan.tokenizer.fingerprint != tokenizer.fingerprint:
        now, then = tokenizer.fingerprint[:12], plan.tokenizer.fingerprint[:12]
        raise RecipeError(
            f"The tokenizer {recipe.tokenizer} has other weights than when {recipe.output} was begun (now "
            f"{now}, then {then}); name another output folder"
        )
    if plan.captions is None and captions is not None:  # of the same recipe, so not pinned yet
        plan = replace(plan, captions=captions)
        folder.write_plan(plan)
    rows = f"kept rows {recipe.keep.rows if recipe.keep else 'none'}"
    for what, pinned, found in (
        (rows, plan.kept, kept),
        (f"class captions {recipe.input.captions}", plan.captions, captions),
    ):
        if pinned != found:
            raise RecipeError(
                f"The {what} were replaced since {recipe.output} was begun, and its tasks are to have the "
                "same ones: put the earlier file back, or name another output folder"
            )
    present = _as_found(plan, shards, folder)
    pairs = enumerate(zip(plan.shards, present.shards, strict=True))
    return present, {number for number, (listed, there) in pairs if listed != there}


def _as_found(plan: Plan, shards: list[Shard], folder: DatasetFolder) -> Plan:
    """The plan with the shards as they are; RecipeError where shards are new, or gone and not given up."""
    found = {shard.label: shard for shard in shards}
    new = sorted(set(found) - {shard.label for shard in plan.shards})
    gone = [number for number, shard in enumerate(plan.shards) if shard.label not in found]
    if gone:
        given_up = folder.given_up()
        gone = [number for number in gone if number not in given_up]
    if new or gone:
        example = new[0] if new else plan.shards[gone[0]].label
        command = f"`bitdance data retry {folder.root} --give-up {' --give-up '.join(map(str, gone[:8]))}`"
        raise RecipeError(
            f"The input of {folder.root} has changed since it was begun: {len(new)} are new and {len(gone)} "
            f"gone (such as {example}); name another output folder"
            + (f", or go on without what is gone: {command}" if gone else "")
        )
    return replace(plan, shards=tuple(found.get(shard.label, shard) for shard in plan.shards))


def _text_tokenizer(recipe: TokenizeRecipe, folder: DatasetFolder, shards: list[Shard]) -> tuple[str, Any]:
    """Name and tokenizer that captions are counted with, trained where the recipe says so; then the folder is
    the recipe's. A start that fails before leaves no trace, and never one in what another job has begun."""
    section = recipe.text_tokenizer
    if section.train is None:
        assert section.name is not None
        text = load_text_tokenizer_or_refuse(section.name)
        _begin(recipe, folder)
        return section.name, text
    if folder.store.read(f"{TEXT_FOLDER}/{TEXT_FILE}") is None:
        say(f"Training a text tokenizer of up to {section.train.vocab_size} entries on the captions")
        working = folder.store.scratch(TEXT_FOLDER)
        try:
            train_and_save(_captions(recipe, shards), section.train.vocab_size, working)
            _begin(recipe, folder)
            folder.store.commit(working, TEXT_FOLDER, TEXT_FILE)
        except FileExistsError:
            say("Another process has trained the text tokenizer meanwhile")
        finally:
            remove_scratch(working)
            folder.store.remove([])  # the folder itself, where it is empty
    return TEXT_FOLDER, load_text_tokenizer_or_refuse(str(folder.store.local(TEXT_FOLDER)))


def _begin(recipe: TokenizeRecipe, folder: DatasetFolder) -> None:
    """Make the folder the recipe's; FolderTaken where another's job has begun there meanwhile."""
    claim_folder(folder.root, recipe, MANIFEST_NAME, FREE_KEYS)
    if folder.store.read(RECORD_NAME) is None:
        folder.store.write(RECORD_NAME, recipe_record(recipe).encode())


def _captions(recipe: TokenizeRecipe, shards: list[Shard]) -> Iterator[str]:
    if recipe.keep is not None:
        yield from kept_captions(recipe.keep)
        return

    def captions(shard: Shard) -> list[str]:
        samples = read_shard(shard, recipe.input)
        return [s.caption for s in samples if isinstance(s, RawSample) and s.caption]

    yield from chain.from_iterable(of_each(shards, captions))


def _lines(tasks: dict[int, str]) -> str:
    return "\n".join(f"  task {number:05d}: {reason}" for number, reason in sorted(tasks.items()))


def _missing(
    recipe: TokenizeRecipe, folder: DatasetFolder, plan: Plan, numbers: range, moved: set[int]
) -> tuple[list[int], dict[int, str], dict[int, str]]:
    """Tasks to do; tasks that failed earlier on the very same shard; and tasks that are done, with what was
    another shard then.

    Args:
        recipe: the recipe.
        folder: the dataset.
        plan: with the shards as they are.
        numbers: the tasks of this run.
        moved: tasks of all runs whose shards the first run listed otherwise: a sample may have come from one
            to the other, which only both together tell.
    """
    missing = list[int]()
    failed, changed = dict[int, str](), dict[int, str]()
    # In this order: a task that another job commits meanwhile must not look like one without a marker.
    present, failures = folder.present(), folder.failures()
    looked_at = sorted({*numbers, *(moved & present.keys())})
    markers = folder.markers(looked_at)
    # Those whose other files do not verify, too: they are of another shard all the same.
    claims = folder.claims([n for n in looked_at if n in present.keys() - markers.keys()], {}) | markers
    given_up = folder.given_up()
    for number in looked_at:
        shard, failure = plan.shards[number], failures.get(number)
        if number in given_up and number not in markers:
            continue
        since = present.get(number, 0.0)
        if number in claims and _changed(recipe, shard, claims[number], since):
            changed[number] = f"{shard.label} has changed since"
        elif number in markers or number not in numbers:
            continue
        elif failure and is_of(failure, shard):
            failed[number] = f"{failure['reason']} (failed earlier)"
        else:
            missing.append(number)
            if number in present:
                say(f"task {number:05d} does not verify and is done again")
    return missing, failed, changed


def _changed(recipe: TokenizeRecipe, shard: Shard, marker: Marker, since: float) -> bool:
    """Whether a task was done with another content of its shard, as far as a few reads can tell; `since` is
    the marker's time."""
    if marker["shard_bytes"] != shard.size:
        return True
    then = marker.get("shard_version")
    if then is None:
        return False
    try:
        return has_changed(shard, recipe.input, then, since)
    except (DataError, OSError):
        return False  # gone, or not to be read: what is done of it stays


def _do(recipe: TokenizeRecipe, plan: Plan, missing: list[int]) -> dict[int, str]:
    """Do tasks, here or in worker processes; the reasons of those that failed."""
    # Here, because it brings in streaming: seconds that a start which finds everything done need not wait.
    from data_pipeline.tokenize.workers import work_here, work_in_processes

    processes = min(recipe.compute.processes, len(missing))
    # Before any task, once for all processes.
    index = index_folder(recipe.keep) if recipe.keep else None
    if processes:
        outcomes = work_in_processes(recipe, plan, index, missing, processes)
    else:
        outcomes = work_here(recipe, plan, index, missing)
    return {n: reason for n, reason in track(outcomes, "Tokenizing shards", len(missing)) if reason}


def parse_slice(text: str | None) -> Slice | None:
    """`I/N` as a slice; RecipeError where it is none."""
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (SLICE.fullmatch(text) and int(index) < int(count)):
        raise RecipeError(f"--slice {text}: expected I/N with 0 <= I < N, for example --slice 3/16")
    return Slice(int(index), int(count))
