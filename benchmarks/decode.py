"""What a tokenize worker does besides encoding: pictures a second with a stub for the encoder.

    python benchmarks/decode.py --pictures 1000

The whole task runs on one core: tar, decoding, resizing, perceptual hash, caption tokens, packing, writing,
hashing, committing. The comparison is what a user would write by hand around an encoder: Pillow's decode,
resize to cover and crop, by the same filter, on the same bytes, already in memory. Both are taken in turns,
shard by shard, and counted in processor seconds, so that other work on the machine does not decide.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.ingest.shards import list_shards
from data_pipeline.manifest import TextTokenizerManifest, TokenizerManifest
from data_pipeline.tokenize.captions import CaptionCounter, text_tokenizer_hash
from data_pipeline.tokenize.folder import Plan
from data_pipeline.tokenize.recipe import TokenizeRecipe
from data_pipeline.tokenize.task import TaskRunner
from models.text_tokens import train_text_tokenizer

SHARD = 100
SIZES = [(512, 512), (512, 384), (384, 512), (512, 341)]  # width, height: longer side 512, as downloaded
BUCKETS = [(256, 256), (224, 288), (288, 224), (192, 352)]


class StubEncoder:
    """Bits of the right shape at no cost."""

    downsample = 16

    def encode(self, pixels: Any) -> Any:
        """Ones. `pixels` is uint8 `[B, height, width, 3]`; the answer int8 `[B, h*w, 32]`."""
        tokens = pixels.shape[1] // 16 * (pixels.shape[2] // 16)
        return np.ones((len(pixels), tokens, 32), np.int8)


def synthesize(folder: Path, pictures: int) -> list[bytes]:
    """Tars of photograph-like JPEGs (quality 95, about 100 kB); their bytes in order."""
    rng = np.random.default_rng(0)
    written = []
    for start in range(0, pictures, SHARD):
        with tarfile.open(folder / f"{start // SHARD:05d}.tar", "w") as tar:
            for number in range(start, min(start + SHARD, pictures)):
                width, height = SIZES[number % len(SIZES)]
                coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
                noisy = np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
                written.append(buffer.getvalue())
                caption = f"a photograph of subject {number} in the evening light, taken from afar".encode()
                for name, data in ((f"{number:09d}.jpg", written[-1]), (f"{number:09d}.txt", caption)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return written


def by_hand(data: bytes) -> Any:
    """What a user would write."""
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    height, width = min(BUCKETS, key=lambda b: abs(np.log(b[0] / b[1] * picture.width / picture.height)))
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def runner(folder: Path) -> TaskRunner:
    """A worker with a stub encoder and a small text tokenizer."""
    recipe = TokenizeRecipe.model_validate(
        {
            "input": {"path": [str(folder / "shards")]},
            "tokenizer": "stub",
            "text_tokenizer": {"train": {"vocab_size": 400}},
            "output": str(folder / "latents"),
            "classes": [{"resolution": 256, "buckets": BUCKETS}],
        }
    )
    text = train_text_tokenizer(["a photograph of a subject in the evening light"] * 9, 400)
    plan = Plan(
        shards=tuple(list_shards(recipe.input)),
        tokenizer=TokenizerManifest(
            fingerprint="stub", downsample=16, bits_per_token=32, dtype="float32", folder="stub"
        ),
        text_tokenizer=TextTokenizerManifest(
            name="text_tokenizer", inside=True, vocab_size=len(text), sha256=text_tokenizer_hash(text)
        ),
        kept=None,
    )
    stub: Any = StubEncoder()
    return TaskRunner(recipe, plan, stub, CaptionCounter(text, 512), None, None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        # The first shard is not counted: a worker imports its libraries once, and does thousands of shards.
        written = synthesize(folder / "shards", SHARD + arguments.pictures)
        worker = runner(folder)
        worker.run(0)
        ours = hand = 0.0
        for number in range(1, len(worker.plan.shards)):
            started = time.process_time()
            worker.run(number)
            between = time.process_time()
            for data in written[number * SHARD : (number + 1) * SHARD]:
                by_hand(data)
            ours, hand = ours + between - started, hand + time.process_time() - between
    count = arguments.pictures
    size = sum(map(len, written)) / len(written) / 1000
    print(f"{count} JPEGs of 512 px and {size:.0f} kB on one core, resized to the buckets of class 256")
    print(f"the whole task but the encoder: {count / ours:.1f} pictures/s")
    print(f"Pillow by hand: {count / hand:.1f} pictures/s; ratio {hand / ours:.2f}")


if __name__ == "__main__":
    main()
