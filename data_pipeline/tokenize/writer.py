"""Writes what one task makes: MDS shards of each class, the table of samples and the quarantine list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.records import LATENT_COLUMNS, LatentRecord
from data_pipeline.streaming_import import MDSWriter
from data_pipeline.tokenize.folder import QUARANTINE_NAME

HASHES = ["sha256"]

# The table of samples: a row per record. `row` counts within the task's class; the records of one picture (in
# several classes, mirrored) share `picture` and `phash`, by which near-duplicates are found.
SAMPLE_COLUMNS = {
    "resolution": "int32",
    "row": "int64",
    "key": "string",
    "bucket": "uint8",
    "n_text": "uint16",
    "picture": "int32",
    "phash": "uint64",
    "cropped": "float32",
}


@dataclass(frozen=True)
class Source:
    """The picture behind a record: its number in the task, its 64-bit perceptual hash (unsigned), and the
    share of
    it that was cut away."""

    picture: int
    phash: int
    cropped: float


class _RecordWriter(MDSWriter):
    """Writes LatentRecords as they are; all else is the library's."""

    def encode_sample(self, sample: LatentRecord) -> bytes:  # type: ignore[override]
        return sample.to_bytes()

    def encode_joint_shard(self) -> bytes:
        # The same bytes as the library's, which copies the whole shard once more.
        offsets = np.zeros(len(self.new_samples) + 1, np.uint32)
        np.cumsum([len(sample) for sample in self.new_samples], dtype=np.uint32, out=offsets[1:])
        offsets += np.uint32(4 + offsets.nbytes + len(self.config_data))
        count = np.uint32(len(self.new_samples))
        return b"".join((count.tobytes(), offsets.tobytes(), self.config_data, *self.new_samples))


class TaskWriter:
    """The outputs of one task, in a partial folder.

    Args:
        folder: existing and empty.
        shard_bytes: size at which a new MDS shard is begun.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.writers: dict[int, Any] = {}
        self.rows: dict[int, int] = {}
        self.samples: list[tuple[Any, ...]] = []
        self.quarantine: list[dict[str, str]] = []

    def write(self, resolution: int, bucket: int, record: LatentRecord, source: Source) -> None:
        """Append a record to its class.

        Args:
            resolution: the class.
            bucket: place of the bucket in the class.
            record: what training reads.
            source: of the picture that it was made from.
        """
        if resolution not in self.writers:
            self.writers[resolution] = _RecordWriter(
                columns=LATENT_COLUMNS,
                out=str(self.folder / str(resolution)),
                hashes=HASHES,
                size_limit=self.shard_bytes,
            )
            self.rows[resolution] = 0
        self.writers[resolution].write(record)
        row = self.rows[resolution]
        picture = (source.picture, source.phash, source.cropped)
        self.samples.append((resolution, row, record.key, bucket, record.n_text, *picture))
        self.rows[resolution] += 1

    def leave_out(self, key: str, reason: str) -> None:
        """Note a sample that goes into no class: it cannot be used, or is too small."""
        self.quarantine.append({"key": key, "reason": reason})

    def finish(self) -> None:
        """Flush everything; the folder is complete but for its marker."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for writer in self.writers.values():
            writer.finish()
        schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in SAMPLE_COLUMNS.items()])
        columns = zip(*self.samples, strict=True) if self.samples else ([] for _ in SAMPLE_COLUMNS)
        table = pa.table([list(column) for column in columns], schema=schema)
        pq.write_table(table, self.folder / "samples.parquet", compression="zstd")
        with open(self.folder / QUARANTINE_NAME, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.quarantine)
