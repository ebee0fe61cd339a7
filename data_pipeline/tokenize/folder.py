"""The dataset's folder while it is being made: the plan, and what state each task is in.

recipe.json         the recipe; another one is refused
plan.json           the input shards in order, and both tokenizers; fixed by the first run, so that a task's
                    number means the same shard for ever
tasks/NNNNN/        a finished task
tasks/.NNNNN.HOST.PID.XXXX.partial/    a task under way (or what a killed one has left)
failed/NNNNN.json   a task that cannot be done: the reason, and the shard's size at that time
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.ingest.shards import Shard
from data_pipeline.manifest import TextTokenizerManifest, TokenizerManifest
from foundation.errors import DataError
from foundation.files import atomic_write, sha256_file

PLAN_NAME = "plan.json"
DONE_NAME = "done.json"
PARTIAL = re.compile(r"^\.(\d+)\.(.+)\.(\d+)\.[0-9a-f]{8}\.partial$")


@dataclass(frozen=True)
class Plan:
    """What all runs of a recipe must agree on.

    Attributes:
        shards: task i reads `shards[i]`.
        tokenizer: the binary tokenizer.
        text_tokenizer: what caption lengths are counted with.
    """

    shards: tuple[Shard, ...]
    tokenizer: TokenizerManifest
    text_tokenizer: TextTokenizerManifest

    def to_json(self) -> str:
        """The plan as JSON text."""
        values = {
            "shards": [asdict(shard) for shard in self.shards],
            "tokenizer": self.tokenizer.model_dump(),
            "text_tokenizer": self.text_tokenizer.model_dump(),
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
        )


class DatasetFolder:
    """Paths and task states under one dataset folder; holds no state of its own."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.tasks = self.root / "tasks"
        self.failures = self.root / "failed"

    def read_plan(self) -> Plan | None:
        """The plan of the first run; None before it."""
        path = self.root / PLAN_NAME
        if not path.exists():
            return None
        try:
            return Plan.from_json(path.read_text())
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} is damaged ({error}); remove the folder {self.root} and start over"
            ) from None

    def write_plan(self, plan: Plan) -> None:
        """Fix the plan."""
        with atomic_write(self.root / PLAN_NAME) as file:
            file.write(plan.to_json())

    def task(self, number: int) -> Path:
        """The folder of a finished task."""
        return self.tasks / f"{number:05d}"

    def new_partial(self, number: int) -> Path:
        """A fresh folder for a task under way; its name tells whose it is."""
        name = f".{number:05d}.{platform.node()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
        path = self.tasks / name
        path.mkdir(parents=True)
        return path

    def sweep(self) -> None:
        """Remove what dead processes of this host have left; other hosts' folders may be alive."""
        for path in self.partials():
            match = PARTIAL.match(path.name)
            if match and match[2] == platform.node() and not _alive(int(match[3])):
                shutil.rmtree(path, ignore_errors=True)

    def sweep_all(self) -> None:
        """Remove everything unfinished, whoever's it is: for when the dataset is finished."""
        for path in (*self.partials(), *self.root.glob(".*.partial"), *self.failures.glob(".*.partial")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def partials(self) -> list[Path]:
        """Folders of tasks under way, and what killed ones have left."""
        if not self.tasks.is_dir():
            return []
        return [path for path in self.tasks.iterdir() if PARTIAL.match(path.name)]

    def read_done(self, number: int) -> dict[str, Any] | None:
        """The marker of a finished task; None where it is not done, or its files do not fit its marker."""
        folder = self.task(number)
        try:
            marker = json.loads((folder / DONE_NAME).read_text())
            files = marker["files"].items()
            sizes_fit = all((folder / name).stat().st_size == entry["bytes"] for name, entry in files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker if sizes_fit else None

    def set_aside(self, number: int) -> None:
        """Remove a finished task that does not verify, so that it is done again."""
        aside = self.new_partial(number)
        os.rename(self.task(number), aside / "broken")
        shutil.rmtree(aside)

    def failure(self, number: int) -> dict[str, Any] | None:
        """Why a task failed; None where it did not."""
        path = self.failures / f"{number:05d}.json"
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"reason": f"{path} is damaged", "shard": "", "size": -1}

    def fail(self, number: int, shard: Shard, reason: str) -> None:
        """Record that a task cannot be done."""
        with atomic_write(self.failures / f"{number:05d}.json") as file:
            json.dump({"reason": reason, "shard": shard.label, "size": shard.size}, file, indent=1)

    def clear_failure(self, number: int) -> None:
        """Forget a failure, so that the task is tried again."""
        (self.failures / f"{number:05d}.json").unlink(missing_ok=True)


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and sha256 of every file under `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in paths
    }


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
