"""Write a small finished latent dataset by the layout of `data_pipeline.manifest`, for tests that read
one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipeline.manifest import (
    ClassManifest,
    FileEntry,
    Manifest,
    TextTokenizerManifest,
    TokenizerManifest,
)
from data_pipeline.records import LATENT_COLUMNS, LatentRecord, pack_bits
from data_pipeline.streaming_import import MDSWriter

CHANNELS = 8
DOWNSAMPLE = 16
GRIDS = {64: [(4, 4)], 128: [(8, 8), (4, 12)], 256: [(16, 16), (8, 24)]}


def encode_caption(caption: str) -> list[int]:
    """A text tokenizer for tests: a token per word."""
    return [100 + len(word) % 50 for word in caption.split()]


def latent_record(resolution: int, number: int, grids: list[tuple[int, int]]) -> LatentRecord:
    """Record `number` of a class: size, caption and bits are functions of it."""
    rng = np.random.default_rng([resolution, number])
    h, w = grids[number % len(grids)]
    caption = " ".join("w" * int(size) for size in rng.integers(1, 9, rng.integers(1, 12)))
    bits = pack_bits(rng.integers(0, 2, (h * w, CHANNELS)) * 2 - 1)
    return LatentRecord(
        bits, h, w, caption, len(caption.split()), f"{resolution}-{number:05d}", {"clip": 0.5}
    )


def write_latent_folder(
    folder: Path,
    samples: dict[int, int],
    tasks: int = 2,
    shard_bytes: int = 1 << 12,
    dropped: dict[int, Iterable[int]] | None = None,
    grids: dict[int, list[tuple[int, int]]] = GRIDS,
    text_tokenizer: str = "words",
) -> Path:
    """Write `samples[resolution]` raw records of each class in `tasks` parts; `dropped` are left out of the
    index."""
    shards: list[dict] = []
    classes: list[ClassManifest] = []
    for resolution, count in sorted(samples.items()):
        left_out = sorted((dropped or {}).get(resolution, ()))
        records = [latent_record(resolution, number, grids[resolution]) for number in range(count)]
        entry = _write_class(folder, resolution, records, tasks, shard_bytes)
        first_sample = sum(c.raw_samples for c in classes)
        side = f"side-test/{resolution}"
        kept = np.delete(np.arange(count), left_out)
        ends = np.cumsum([shard["samples"] for shard in entry])
        (folder / side).mkdir(parents=True)
        np.save(folder / side / "n_text.npy", np.array([records[i].n_text for i in kept], np.uint16))
        np.save(folder / side / "bucket.npy", (kept % len(grids[resolution])).astype(np.uint8))
        kept_per_shard = np.bincount(np.searchsorted(ends, kept, side="right"), minlength=len(entry))
        np.save(folder / side / "shard_sizes.npy", kept_per_shard.astype(np.uint32))
        np.save(folder / side / "dropped.npy", np.array(left_out, np.int64))
        classes.append(
            ClassManifest(
                resolution=resolution,
                buckets=[(h * DOWNSAMPLE, w * DOWNSAMPLE) for h, w in grids[resolution]],
                first_shard=len(shards),
                shards=len(entry),
                first_sample=first_sample,
                raw_samples=count,
                samples=len(kept),
                side=side,
            )
        )
        shards += entry
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    _write_manifest(folder, classes, tasks, text_tokenizer)
    return folder


def _write_class(
    folder: Path, resolution: int, records: list[LatentRecord], tasks: int, shard_bytes: int
) -> list[dict]:
    shards = []
    for task, numbers in enumerate(np.array_split(np.arange(len(records)), tasks)):
        out = folder / "tasks" / f"{task:05d}" / str(resolution)
        with MDSWriter(
            columns=LATENT_COLUMNS, out=str(out), hashes=["sha256"], size_limit=shard_bytes
        ) as writer:
            for number in numbers:
                writer.write(records[number].to_mds())
        for shard in json.loads((out / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"tasks/{task:05d}/{resolution}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return shards


def _write_manifest(folder: Path, classes: list[ClassManifest], tasks: int, text_tokenizer: str) -> None:
    files = {}
    for path in [folder / "index.json", *sorted((folder / "side-test").rglob("*.npy"))]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[str(path.relative_to(folder))] = FileEntry(bytes=path.stat().st_size, sha256=digest)
    manifest = Manifest(
        code_version="test",
        recipe_sha256="0" * 64,
        tokenizer=TokenizerManifest(
            fingerprint="f" * 64,
            downsample=DOWNSAMPLE,
            bits_per_token=CHANNELS,
            dtype="float32",
            folder="none",
        ),
        text_tokenizer=TextTokenizerManifest(
            name=text_tokenizer, inside=False, vocab_size=512, sha256="0" * 64
        ),
        classes=classes,
        tasks=tasks,
        quarantined=0,
        near_duplicates=sum(c.raw_samples - c.samples for c in classes),
        files=files,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
