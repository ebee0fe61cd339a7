"""One task: an input shard in, a folder of latent shards out, committed by one rename.

What a task writes is a function of (recipe, shard, kept rows, tokenizers): no time, host or process number
goes in, and batches are formed in the shard's order, so a rerun writes the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.buckets import Placement
from data_pipeline.ingest.kept import KeptRows, identity, scores_of
from data_pipeline.ingest.made_once import touch
from data_pipeline.ingest.refusals import check_refused
from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.shards import Shard, read_shard, shard_identities
from data_pipeline.ingest.storage import CHANGED_MEANWHILE
from data_pipeline.ingest.versions import captions_version, look_at, shard_version
from data_pipeline.records import LatentRecord, pack_bits
from data_pipeline.tokenize.captions import CaptionCounter
from data_pipeline.tokenize.decoding import HASH_DEFINITION, Decoded, decode_chosen, ordered_map
from data_pipeline.tokenize.encoder import Encoder
from data_pipeline.tokenize.folder import DatasetFolder, Plan
from data_pipeline.tokenize.marker import DONE_NAME, file_entries, marker_text
from data_pipeline.tokenize.recipe import TokenizeRecipe
from data_pipeline.tokenize.writer import Source, TaskWriter
from foundation.errors import DataError
from foundation.provenance import package_version

DECODE_WINDOW_PER_WORKER = 8  # pictures that are held, of this size; a larger one counts as several
DECODE_WINDOW_BYTES = 4 << 20
# A task may write nothing but at its end; by this it shows that it is under way.
HEARTBEAT_SECONDS = 60.0
FITS_NO_CLASS = "too small for every class, or none without cutting off more than pictures.max_cropped"


class TaskRunner:
    """Everything that tasks of one process share.

    Args:
        recipe: the recipe.
        plan: as fixed by the first run.
        encoder: the loaded binary tokenizer.
        counter: the loaded text tokenizer.
        kept: the filter's rows; None keeps all samples.
        decoders: executor of decode workers; None decodes here.
    """

    def __init__(
        self,
        recipe: TokenizeRecipe,
        plan: Plan,
        encoder: Encoder,
        counter: CaptionCounter,
        kept: KeptRows | None,
        decoders: Executor | None,
    ):
        self.recipe = recipe
        self.plan = plan
        self.encoder = encoder
        self.counter = counter
        self.kept = kept
        self.decoders = decoders
        self.folder = DatasetFolder(recipe.output)

    def run(self, number: int) -> dict[str, Any]:
        """Do a task and commit it; its marker.

        Raises:
            DataError: the shard is damaged; nothing is left behind.
            TooManyRefused: too many of its samples are.
        """
        shard = self.plan.shards[number]
        working = self.folder.new_partial(number)
        try:
            task = _Task(self, shard, working)
            marker = task.run()
            (working / DONE_NAME).write_bytes(marker_text(marker))
            task.check_input()  # last: what changes later is newer than the marker
            self.folder.commit(working, number)
        except FileNotFoundError:
            # Swept by another host, which takes what has been silent for a day for left behind.
            done = None if working.exists() else self.folder.read_done(number)
            if done is None:
                raise
            return done
        finally:
            shutil.rmtree(working, ignore_errors=True)
        return marker


def _weight(chosen: tuple[RawSample, str, dict[str, float]]) -> int:
    """Of a sample under way: how many pictures it counts as."""
    return 1 + len(chosen[0].image) // DECODE_WINDOW_BYTES


@dataclass(frozen=True)
class _Waiting:
    """A picture that waits for its batch: the record without its bits, and `[height, width, 3]` uint8."""

    record: LatentRecord
    pixels: NDArray[np.uint8]
    source: Source


class _Task:
    def __init__(self, runner: TaskRunner, shard: Shard, working: Path):
        self.runner = runner
        self.recipe = runner.recipe
        self.shard = shard
        self.working = working
        self.writer = TaskWriter(working, runner.recipe.shard_megabytes << 20)
        self.counts: Counter[str] = Counter()
        self.refused: list[dict[str, str]] = []
        self.last_beat = 0.0
        self.batches: dict[tuple[int, int], list[_Waiting]] = {}
        self.look = look_at(shard, runner.recipe.input)
        self.version = shard_version(shard, runner.recipe.input)

    def run(self) -> dict[str, Any]:
        """Write everything but the marker, which it returns."""
        chosen = self._chosen_samples()
        window = DECODE_WINDOW_PER_WORKER * max(1, self.recipe.compute.decoders)
        decode = partial(decode_chosen, recipe=self.recipe)
        results = ordered_map(self.runner.decoders, decode, chosen, _weight, window)
        for (sample, caption, scores), decoded in results:
            if isinstance(decoded, str):
                self._refuse(sample.key, decoded)
            elif decoded.too_small:
                self.counts["too_small"] += 1
                self.writer.leave_out(sample.key, FITS_NO_CLASS)
            else:
                self._place(sample.key, caption, scores, decoded)
        for bucket in list(self.batches):
            self._encode(*bucket)
        self.writer.finish()
        self._check_bad_fraction()
        return self._marker()

    def check_input(self) -> None:
        """Raise DataError where what was read is not one and the same, or not what other tasks read."""
        section = self.recipe.input
        if look_at(self.shard, section) != self.look and shard_version(self.shard, section) != self.version:
            raise DataError(f"{self.shard.label} {CHANGED_MEANWHILE}")
        if captions_version(section) != self.runner.plan.captions:
            raise DataError(f"{section.captions} {CHANGED_MEANWHILE}")

    def _chosen_samples(self) -> Iterator[tuple[RawSample, str, dict[str, float]]]:
        """Samples that were kept and have a caption, with it and with their scores."""
        section, kept = self.recipe.input, self.runner.kept
        rows: dict[Any, dict[str, Any]] = {}
        if kept is not None:
            rows = kept.rows(shard_identities(self.shard, section, kept.by))
        for sample in read_shard(self.shard, section):
            self._beat()
            self.counts["read"] += 1
            if isinstance(sample, Refused):
                self._refuse(sample.key, sample.reason)
                continue
            caption, scores = sample.caption, scores_of(sample.fields)
            if kept is not None:
                row = rows.get(identity(sample, kept.by))
                if row is None:
                    self.counts["not_kept"] += 1
                    continue
                caption, scores = row["caption"], row["scores"]
            if not (caption or "").strip() and self.recipe.captions.missing == "drop":
                self._refuse(sample.key, "no caption")
                continue
            yield sample, caption or "", scores

    def _place(self, key: str, caption: str, scores: dict[str, float], decoded: Decoded) -> None:
        number = self.counts["used"]
        self.counts["used"] += 1
        text, n_text = self.runner.counter.fit(caption)
        for fitted in decoded.fitted:
            versions = [(key, fitted.pixels)]
            if self.recipe.pictures.flips:
                versions.append((f"{key}-flip", np.ascontiguousarray(fitted.pixels[:, ::-1])))
            for name, pixels in versions:
                record = LatentRecord(b"", *self._grid(fitted.placement), text, n_text, name, scores)
                source = Source(number, decoded.phash, fitted.placement.cropped)
                place = (fitted.class_place, fitted.placement.bucket)
                batch = self.batches.setdefault(place, [])
                batch.append(_Waiting(record, pixels, source))
                area = fitted.placement.height * fitted.placement.width
                if len(batch) >= max(1, self.recipe.batch_pixels // area):
                    self._encode(*place)

    def _grid(self, placement: Placement) -> tuple[int, int]:
        side = self.runner.encoder.downsample
        return placement.height // side, placement.width // side

    def _encode(self, class_place: int, bucket: int) -> None:
        batch = self.batches.pop((class_place, bucket))
        bits = self.runner.encoder.encode(np.stack([waiting.pixels for waiting in batch]))
        resolution = self.recipe.classes[class_place].resolution
        for waiting, picture in zip(batch, bits, strict=True):
            record = replace(waiting.record, bits=pack_bits(picture))
            self.writer.write(resolution, bucket, record, waiting.source)
            self.counts["records"] += 1

    def _beat(self) -> None:
        if time.monotonic() - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = time.monotonic()
            touch(self.working)

    def _refuse(self, key: str, reason: str) -> None:
        self.counts["refused"] += 1
        self.refused.append({"key": key, "reason": reason})
        self.writer.leave_out(key, reason)

    def _check_bad_fraction(self) -> None:
        considered = self.counts["read"] - self.counts["not_kept"]
        check_refused(self.shard.label, self.refused, considered, self.recipe.max_bad_fraction)

    def _marker(self) -> dict[str, Any]:
        names = ("read", "not_kept", "refused", "too_small", "used", "records")
        return {
            "shard": self.shard.label,
            "shard_bytes": self.shard.size,
            "shard_version": self.version,
            "counts": {name: self.counts[name] for name in names},
            "classes": {str(resolution): rows for resolution, rows in sorted(self.writer.rows.items())},
            "fingerprint": self.runner.plan.tokenizer.fingerprint,
            "perceptual_hash": HASH_DEFINITION,
            "text_hash": self.runner.plan.text_tokenizer.sha256,
            "code_version": package_version("bitdance-trainer"),
            "files": file_entries(self.working),
        }
