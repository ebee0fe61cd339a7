"""The dataset while it is being made, in a folder or on S3: the plan, and what state each task is in.

recipe.json         the recipe; another one is refused
plan.json           the input shards in order, both tokenizers and which kept rows; fixed by the first run, so
                    that a task's number means the same shard for ever
tasks/NNNNN/        a finished task
tasks/.NNNNN.HOST.PID.XXXXXXXX.partial/    a task under way (or what a killed one has left)
                    (on S3: in the local temporary folder)
failed/NNNNN.json   a task that cannot be done: the reason, the shard's size at that time, and the samples
                    that could not be used where they were too many
died/NNNNN.json     a task that is not done, and at which a worker process died: how often, and how last time
given_up/NNNNN.json a task that the dataset goes without, by `bitdance data retry --give-up`; remove the file
                    to have the task back
damaged/NNNNN.json  a task that is there, but that `verify` or `finalize` found damaged, and how: it counts as
                    not done. Sizes are looked at in each run; all bytes of a large dataset cannot be
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.ingest.shards import Shard
from data_pipeline.ingest.storage import file_state
from data_pipeline.manifest import MANIFEST_NAME, TextTokenizerManifest, TokenizerManifest
from data_pipeline.store import FolderStore, open_store
from data_pipeline.tokenize.marker import DONE_NAME, Marker, parse_marker
from foundation.errors import DataError
from foundation.json_files import parse_json
from foundation.partials import PARTIAL_SUFFIX, sweep_abandoned

PLAN_NAME = "plan.json"
TASKS, FAILED, DIED, GIVEN_UP, DAMAGED = "tasks", "failed", "died", "given_up", "damaged"
QUARANTINE_NAME = "quarantine.jsonl"
NUMBER = re.compile("[0-9]{5,}")
MARKER = re.compile(TASKS + r"/([0-9]{5,})/" + re.escape(DONE_NAME))
NOTE = re.compile(r"[a-z_]+/([0-9]{5,})\.json")
REFUSED_LISTED = 10_000  # samples in the file of a failed task
PARTIAL_TASK = re.compile(r"\.[0-9]{5,}\..+\.partial")


@dataclass(frozen=True)
class Plan:
    """What all runs of a recipe must agree on.

    Attributes:
        shards: task i reads `shards[i]`.
        tokenizer: the binary tokenizer.
        text_tokenizer: what caption lengths are counted with.
        kept: version of the filter's rows (`ingest/kept.py`); None where all samples are kept.
        captions: version of the class captions (`ingest/versions.py`); None where the recipe names none, or
            the plan was made before they were pinned.
    """

    shards: tuple[Shard, ...]
    tokenizer: TokenizerManifest
    text_tokenizer: TextTokenizerManifest
    kept: str | None
    captions: str | None = None

    def to_json(self) -> str:
        """The plan as JSON text."""
        values = {
            "shards": [asdict(shard) for shard in self.shards],
            "tokenizer": self.tokenizer.model_dump(),
            "text_tokenizer": self.text_tokenizer.model_dump(),
            "kept": self.kept,
            "captions": self.captions,
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            shards=tuple(Shard(**shard) for shard in values["shards"]),
            tokenizer=TokenizerManifest(**values["tokenizer"]),
            text_tokenizer=TextTokenizerManifest(**values["text_tokenizer"]),
            kept=values["kept"],
            captions=values.get("captions"),
        )


def is_of(note: Mapping[str, Any], shard: Shard) -> bool:
    """Whether a note about a task was made while its shard was what it is now, as its listing tells."""
    return (note["size"], note.get("listing", "")) == (shard.size, shard.listing)


class DatasetFolder:
    """Paths and task states of one dataset; holds no state of its own."""

    def __init__(self, root: str | Path):
        self.store = open_store(root)
        self.root = self.store.root

    def address(self, name: str) -> str:
        """Path or `s3://` address of a file of the dataset."""
        return self.store.address(name)

    @property
    def quarantines(self) -> str:
        """The tasks' lists of samples that went into no class, as a pattern."""
        return self.address(f"{TASKS}/*/{QUARANTINE_NAME}")

    def read_plan(self) -> Plan | None:
        """The plan of the first run; None before it."""
        text = self.store.read(PLAN_NAME)
        if text is None:
            return None
        try:
            return Plan.from_json(text.decode())
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.address(PLAN_NAME)} is damaged, or was made by an earlier version ({error}): put "
                "back a copy of it, go on with that version, or name another output folder"
            ) from None

    def write_plan(self, plan: Plan) -> None:
        """Fix the plan."""
        self.store.write(PLAN_NAME, plan.to_json().encode())

    def task(self, number: int) -> str:
        """The name of a finished task's folder."""
        return f"{TASKS}/{number:05d}"

    def new_partial(self, number: int) -> Path:
        """A fresh local folder for a task under way; its name tells whose it is."""
        return self.store.scratch(self.task(number))

    def commit(self, working: Path, number: int) -> None:
        """Make a task's folder appear. Where another worker was first with the task, its folder stays; one
        that does not verify stays until this moment: its shards may be all that is left of the input."""
        committed = False
        while not committed:
            try:
                self.store.commit(working, self.task(number), DONE_NAME)
                committed = True
            except FileExistsError:
                committed = bool(self.markers([number]))  # what they wrote is what we wrote
                if not committed:
                    self.set_aside(number)
        self.forget(number, FAILED, DIED, DAMAGED)

    def reopen(self) -> None:
        """The dataset is not finished any more: a task is to change."""
        self.store.remove([MANIFEST_NAME])

    def sweep(self) -> None:
        """Remove what killed processes have left, and nothing that a living one may still be making."""
        if not isinstance(self.store, FolderStore):
            return  # working folders are not in the dataset
        root = self.store.path
        for folder in (root, *(root / name for name in (TASKS, FAILED, DIED, GIVEN_UP, DAMAGED))):
            sweep_abandoned(folder.glob(f".*{PARTIAL_SUFFIX}"))

    def partials(self) -> list[Path]:
        """Folders of tasks under way, and what killed ones have left; unknown on S3."""
        if not isinstance(self.store, FolderStore) or not (self.store.path / TASKS).is_dir():
            return []
        folder = self.store.path / TASKS
        return [path for path in folder.iterdir() if PARTIAL_TASK.fullmatch(path.name)]

    def markers(self, numbers: Sequence[int]) -> dict[int, Marker]:
        """Markers of those of the tasks that are done: whole by size, and not known to be damaged."""
        damaged = self.damaged()
        return self._whole([number for number in numbers if number not in damaged])

    def claims(self, numbers: Sequence[int], unreadable: dict[str, str] | None = None) -> dict[int, Marker]:
        """The markers that are there, whatever became of the other files since; see `Store.read_many`."""
        names = {f"{self.task(number)}/{DONE_NAME}": number for number in numbers}
        contents = self.store.read_many(list(names), unreadable)
        found = {names[name]: parse_marker(text) for name, text in contents.items()}
        return {number: marker for number, marker in found.items() if marker is not None}

    def _whole(self, numbers: Sequence[int]) -> dict[int, Marker]:
        claims = self.claims(numbers)
        # One listing of all, or of the only one asked for: a request for each would take hours on S3.
        sizes = self.store.files(TASKS if len(numbers) > 1 else self.task(numbers[0])) if claims else {}

        def whole(task: str, marker: Marker) -> bool:
            entries = marker["files"].items()
            return all(sizes.get(f"{task}/{name}", (-1,))[0] == entry["bytes"] for name, entry in entries)

        return {number: marker for number, marker in claims.items() if whole(self.task(number), marker)}

    def read_done(self, number: int) -> Marker | None:
        """The marker of a task, where its files have the sizes that it says."""
        return self._whole([number]).get(number)

    def present(self) -> dict[int, float]:
        """Tasks that claim to be finished, whether their files fit or not, and the times of their markers
        (seconds since 1970; 0 where there is none)."""
        if isinstance(self.store, FolderStore):
            folder = self.store.path / TASKS
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            tasks = [int(name) for name in names if NUMBER.fullmatch(name)]
            states = {task: file_state(self.address(f"{self.task(task)}/{DONE_NAME}")) for task in tasks}
            return {task: state.content_changed / 1e9 if state else 0.0 for task, state in states.items()}
        listed = self.store.files(TASKS).items()
        return {int(match[1]): time for name, (_, time) in listed if (match := MARKER.fullmatch(name))}

    def set_aside(self, number: int) -> None:
        """Remove a task that does not verify, so that it does not count."""
        self.reopen()
        if isinstance(self.store, FolderStore):
            aside = self.new_partial(number)
            try:
                with suppress(FileNotFoundError):  # another job was first with it
                    os.rename(self.store.path / self.task(number), aside / "broken")
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            # Without its marker it does not count; the others are overwritten by files of the same names.
            self.store.remove([f"{self.task(number)}/{DONE_NAME}"])

    def failures(self) -> dict[int, dict[str, Any]]:
        """Why tasks failed."""
        return self._notes(FAILED)

    def deaths(self) -> dict[int, dict[str, Any]]:
        """The tasks that are not done and at which workers died: how often (`deaths`), how last time."""
        return self._notes(DIED)

    def given_up(self) -> dict[int, dict[str, Any]]:
        """The tasks that the dataset goes without, and why."""
        return self._notes(GIVEN_UP)

    def damaged(self) -> dict[int, dict[str, Any]]:
        """The tasks that were found damaged, and how."""
        return self._notes(DAMAGED)

    def _notes(self, folder: str) -> dict[int, dict[str, Any]]:
        names = self.store.files(folder)
        numbers = {name: int(match[1]) for name in names if (match := NOTE.fullmatch(name))}
        found = {}
        for name, text in self.store.read_many(list(numbers)).items():
            try:
                note = parse_json(text, self.address(name), "remove it", "reason", "shard", "size")
            except DataError as error:
                note = {"reason": str(error), "shard": "", "size": -1}
            found[numbers[name]] = note
        return found

    def fail(self, number: int, shard: Shard, reason: str, refused: Sequence[dict[str, str]] = ()) -> None:
        """Record that a task cannot be done, and which of its samples could not be used."""
        more: dict[str, Any] = {}
        if refused:
            more = {"refused": refused[:REFUSED_LISTED], "refused_in_all": len(refused)}
        self._note(FAILED, number, shard, reason, **more)

    def note_death(self, number: int, shard: Shard, reason: str) -> int:
        """Record that a worker died at a task; how many now have, since its shard is what it is."""
        before = self.deaths().get(number)
        deaths = 1 + (before.get("deaths", 0) if before and is_of(before, shard) else 0)
        self._note(DIED, number, shard, reason, deaths=deaths)
        return deaths

    def give_up(self, number: int, shard: Shard, reason: str) -> None:
        """Record that the dataset goes without a task, and remove what is there of it."""
        self.reopen()
        self._note(GIVEN_UP, number, shard, reason)
        if number in self.present():
            self.set_aside(number)
        self.forget(number, FAILED, DIED, DAMAGED)

    def note_damage(self, number: int, shard: Shard, reason: str) -> None:
        """Record that a task that is there is damaged, so that the next run does it again."""
        self._note(DAMAGED, number, shard, reason)

    def forget(self, number: int, *kinds: str) -> None:
        """Forget that a task failed (`FAILED`), killed workers (`DIED`), or was damaged (`DAMAGED`)."""
        self.store.remove([f"{kind}/{number:05d}.json" for kind in kinds])

    def _note(self, kind: str, number: int, shard: Shard, reason: str, **more: Any) -> None:
        known_by = {"shard": shard.label, "size": shard.size, "listing": shard.listing}
        note = {"reason": reason, **known_by, **more}
        self.store.write(f"{kind}/{number:05d}.json", json.dumps(note, indent=1).encode())
