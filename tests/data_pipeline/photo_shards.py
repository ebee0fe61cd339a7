"""Small image shards, a tiny tokenizer and a tokenize recipe, for the tests of the offline pipeline."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from data_pipeline.metadata.schema import SCORES
from data_pipeline.tokenize.recipe import TokenizeRecipe
from models.tokenizer import BinaryTokenizer, TokenizerConfig, save_tokenizer

SIZES = [(64, 64), (40, 80), (90, 45), (64, 70), (33, 32), (128, 128)]  # height, width


def picture(seed, height, width):
    """A smooth picture that no other seed resembles, as JPEG bytes."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, shards, samples=6, bad=()):
    """`shards` tars of `samples` pictures; samples numbered in `bad` (over all shards) are no pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for i in range(samples):
            number = shard * samples + i
            key = f"{shard:05d}{i:04d}"
            data = b"no picture" if number in bad else picture(number, *SIZES[i % len(SIZES)])
            body = {"key": key, "url": f"https://a.example/{number}", "hash": number, "AESTHETIC_SCORE": 5.0}
            members += [(f"{key}.jpg", data), (f"{key}.json", json.dumps(body).encode())]
            members.append((f"{key}.txt", f"a picture of number {number} in a frame".encode()))
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")


def write_kept(path, captions):
    """Rows as the filter leaves them: the captions of hashes 0, 1, ..."""
    columns = {name: [5.0] * len(captions) for name in SCORES}
    table = {"hash": list(range(len(captions))), "caption": captions}
    pq.write_table(pa.table(table | columns), path)


def write_tokenizer(folder, seed=0):
    """A random tokenizer of 16 bits a token, 16 times down."""
    torch.manual_seed(seed)
    config = TokenizerConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), z_channels=16, num_res_blocks=1)
    save_tokenizer(BinaryTokenizer(config).eval(), folder)


def tokenize_recipe(tmp_path, **changes):
    """Two classes of 32 and 64 px on what `write_shards(tmp_path / "shards")` wrote."""
    values = {
        "input": {"kind": "webdataset", "path": [str(tmp_path / "shards")]},
        "tokenizer": str(tmp_path / "tokenizer"),
        "text_tokenizer": {"train": {"vocab_size": 300}},
        "output": str(tmp_path / "latents"),
        "classes": [
            {"resolution": 32, "buckets": [[32, 32]]},
            {"resolution": 64, "buckets": [[64, 64], [32, 64], [64, 32]]},
        ],
        "assign": "every",
        "batch_pixels": 3 * 32 * 32,
        "compute": {"processes": 0},  # here: a worker process takes seconds to start
    }
    return TokenizeRecipe.model_validate(values | changes)


def tree(folder):
    """Relative path -> sha256 of every file under a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }
