"""A tokenizer, latents of random bits and a recipe for a tiny model: seconds to train on a CPU."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data_pipeline.manifest import (
    ClassManifest,
    FileEntry,
    Manifest,
    TextTokenizerManifest,
    TokenizerManifest,
)
from data_pipeline.records import LATENT_COLUMNS, LatentRecord, pack_bits
from data_pipeline.streaming_import import MDSWriter
from data_pipeline.tokenize.captions import text_tokenizer_hash
from models.text_tokens import load_text_tokenizer, train_text_tokenizer
from models.tokenizer import BinaryTokenizer, TokenizerConfig, save_tokenizer, tokenizer_fingerprint

DOWNSAMPLE = 16
GRIDS = {128: [(8, 8)], 256: [(16, 16), (8, 16)]}
CAPTIONS = ["a red house by the sea", "two cats on a sofa", "hills at night", "a rocket", "a cup of coffee"]


def make_inputs(folder: Path, bits: int = 8, samples: dict[int, int] | None = None) -> None:
    """`tokenizer/`, `text/` and `latents/` in ``folder``."""
    torch.manual_seed(0)
    config = TokenizerConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), z_channels=bits, num_res_blocks=1)
    save_tokenizer(BinaryTokenizer(config), folder / "tokenizer")
    text_tokenizer = train_text_tokenizer(CAPTIONS, 300)
    text_tokenizer.save_pretrained(folder / "text")

    def n_text(caption: str) -> int:
        return len(text_tokenizer(caption, add_special_tokens=False)["input_ids"])

    write_latents(folder, bits, samples or {128: 6, 256: 6}, n_text)


def write_latents(folder: Path, bits: int, samples: dict[int, int], n_text: Any) -> None:
    root, shards, classes = folder / "latents", [], []
    for resolution, count in samples.items():
        grids, side = GRIDS[resolution], f"side/{resolution}"
        records = []
        for number in range(count):
            rng = np.random.default_rng([resolution, number])
            h, w = grids[number % len(grids)]
            caption = f"{CAPTIONS[number % len(CAPTIONS)]} {number}"
            packed = pack_bits(rng.integers(0, 2, (h * w, bits)) * 2 - 1)
            records.append(LatentRecord(packed, h, w, caption, n_text(caption), f"{resolution}-{number}"))
        out = root / "tasks" / "00000" / str(resolution)
        with MDSWriter(columns=LATENT_COLUMNS, out=str(out), hashes=["sha256"]) as writer:
            for record in records:
                writer.write(record.to_mds())
        new = json.loads((out / "index.json").read_text())["shards"]
        for shard in new:
            shard["raw_data"]["basename"] = f"tasks/00000/{resolution}/{shard['raw_data']['basename']}"
        (root / side).mkdir(parents=True)
        np.save(root / side / "n_text.npy", np.array([r.n_text for r in records], np.uint16))
        np.save(root / side / "bucket.npy", (np.arange(count) % len(grids)).astype(np.uint8))
        np.save(root / side / "shard_sizes.npy", np.array([s["samples"] for s in new], np.uint32))
        np.save(root / side / "dropped.npy", np.zeros(0, np.int64))
        classes.append(
            ClassManifest(
                resolution=resolution,
                buckets=[(h * DOWNSAMPLE, w * DOWNSAMPLE) for h, w in grids],
                first_shard=len(shards),
                shards=len(new),
                first_sample=sum(c.samples for c in classes),
                raw_samples=count,
                samples=count,
                side=side,
            )
        )
        shards += new
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    write_manifest(root, bits, classes, tokenizer_fingerprint(folder / "tokenizer"))


def write_manifest(root: Path, bits: int, classes: list[ClassManifest], fingerprint: str) -> None:
    paths = [root / "index.json", *sorted((root / "side").rglob("*.npy"))]
    files = {
        str(path.relative_to(root)): FileEntry(
            bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in paths
    }
    manifest = Manifest(
        code_version="test",
        recipe_sha256="0" * 64,
        tokenizer=TokenizerManifest(
            fingerprint=fingerprint,
            downsample=DOWNSAMPLE,
            bits_per_token=bits,
            dtype="float32",
            folder="tokenizer",
        ),
        text_tokenizer=TextTokenizerManifest(
            name="text",
            inside=False,
            vocab_size=300,
            sha256=text_tokenizer_hash(load_text_tokenizer(root.parent / "text")),
        ),
        classes=classes,
        tasks=1,
        quarantined=0,
        near_duplicates=0,
        files=files,
    )
    (root / "manifest.json").write_text(manifest.to_json())


def recipe_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values; ``changes`` are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "steps": 6,
        "model": {
            "p": 4,
            "random": {
                "text_tokenizer": str(folder / "text"),
                "backbone": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "head_dim": 16,
                },
            },
            "head": {"width": 128, "depth": 1, "adaln": 1},
        },
        "tokenizer": str(folder / "tokenizer"),
        "data": {
            "latents": str(folder / "latents"),
            "global_batch_size": 8,
            "ratio": {128: 1, 256: 1},
            "max_tokens": 800,
            "image_to_caption": 0.2,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "precision": "float32",
        "zero": {"stage": 3},
        "checkpoints": {"every_minutes": None},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return values


def write_recipe(folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe_values(folder, **changes), sort_keys=False))
    return path
