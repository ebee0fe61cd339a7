"""Latent records: written and randomly read per second on one core, and bytes per sample.

    python benchmarks/records.py --records 100000

Records of a 512 px class: 4 KiB of random bits, a caption, a key and scores. The comparison is streaming's
own reader on the same shards, which is what `StreamingDataset` reads with. Processor seconds, so that other
work on the machine does not decide.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.latents import _OpenShard
from data_pipeline.records import LatentRecord
from data_pipeline.streaming_import import MDSReader
from data_pipeline.tokenize.writer import Source, TaskWriter

BITS = 4096
CAPTION = "a photograph of a lighthouse on a rocky shore in the evening, waves breaking below"
SOURCE = Source(0, 0, 0.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=100_000)
    count = parser.parse_args().records
    rng = np.random.default_rng(0)
    bits = [rng.bytes(BITS) for _ in range(256)]
    scores = {"aesthetic": 5.25}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        writer = TaskWriter(folder, 64 << 20)
        started = time.process_time()
        for number in range(count):
            record = LatentRecord(bits[number % 256], 32, 32, CAPTION, 17, f"{number:09d}", scores)
            writer.write(512, 0, record, SOURCE)
        writer.finish()
        written = time.process_time() - started
        shards = json.loads((folder / "512" / "index.json").read_text())["shards"]
        size = sum(shard["raw_data"]["bytes"] for shard in shards)
        starts = np.cumsum([0, *(shard["samples"] for shard in shards)])
        order = rng.permutation(count)
        places = [(int(s), int(n - starts[s])) for n, s in zip(order, _shard_of(order, starts), strict=True)]
        opened = [_OpenShard(folder / "512" / shard["raw_data"]["basename"]) for shard in shards]
        started = time.process_time()
        for shard, row in places:
            opened[shard].read(row)
        ours = time.process_time() - started
        theirs_readers = [MDSReader.from_json(str(folder), "512", dict(shard)) for shard in shards]
        started = time.process_time()
        for shard, row in places:
            theirs_readers[shard][row]
        theirs = time.process_time() - started
    print(f"{count:,} records of 4 KiB in {len(shards)} shards, on one core")
    print(f"written: {count / written:,.0f}/s")
    print(f"read at random: {count / ours:,.0f}/s; by streaming's reader {count / theirs:,.0f}/s")
    plain = BITS + len(CAPTION.encode())
    print(
        f"bytes per sample: {size / count:.0f}, {size / count / plain - 1:+.1%} of bits + caption ({plain})"
    )


def _shard_of(order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.searchsorted(starts, order, side="right") - 1


if __name__ == "__main__":
    main()
