"""The order of a billion samples: start-up, any step, and memory; against mosaicml-streaming's own start-up.

    python benchmarks/order.py [--samples 1000000000] [--streaming 1000000 10000000 100000000]

Ours: a side index of three classes (256:512:1024 px = 2:7:1) in shards of 16,384 samples, on disk as
sparse files (so the pass over the caption lengths is as fast as from the page cache; a disk adds its time for
2 bytes a sample). Measured in a process of its own, from opening the side index on: the time to the first
step's 2560 samples with their lengths, the time of other steps anywhere in the next 400 epochs of work, and
the growth of the process's memory, all of it and without pages of files, which the system takes back when
it likes. Imports (numpy, torch by way of the sequence layout) come before and are shown apart.

"Computing" is processor time: what a busy machine does not inflate.

streaming: `StreamingDataset` on an `index.json` of as many samples in shards of 16,384, `py1e` shuffle,
    batch 40
of 64 ranks; the time until the constructor has returned and it has computed what its first epoch's order is
(which iterating needs before the first sample), and its memory with the shared part. Sizes rise until one
fails or takes more than two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 16_384
BATCH = 2560
MIX = {256: 2, 512: 7, 1024: 1}
GRIDS = {256: (16, 16), 512: (32, 32), 1024: (64, 64)}
TIME_LIMIT = 120


def write_side_index(folder: Path, samples: int) -> dict[int, int]:
    """Sparse side-index files of the classes; returns the samples of each."""
    counts = {name: samples * weight // sum(MIX.values()) for name, weight in MIX.items()}
    for name, count in counts.items():
        (folder / str(name)).mkdir()
        for column, dtype in (("n_text", np.uint16), ("bucket", np.uint8)):
            path = folder / str(name) / f"{column}.npy"
            np.lib.format.open_memmap(path, "w+", dtype, (count,))
        sizes = np.full(-(-count // SHARD), SHARD, np.uint32)
        sizes[-1] = count - SHARD * (len(sizes) - 1)
        np.save(folder / str(name) / "shard_sizes.npy", sizes)
        np.save(folder / str(name) / "dropped.npy", np.zeros(0, np.int64))
    return counts


def memory(field: str) -> float:
    """MB of this process by /proc/self/status: VmRSS (now), VmHWM (most ever), RssAnon (without files)."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field + ":")).split()[1]) / 1024


def measure_ours(folder: Path, counts: dict[int, int]) -> dict[str, float]:
    from data_pipeline.batch_recipe import BatchRecipe
    from data_pipeline.class_index import load_class_index
    from data_pipeline.global_batch import BatchPlan
    from data_pipeline.manifest import SIDE_FILES, ClassManifest
    from data_pipeline.packing import SampleCost
    from data_pipeline.records import LatentRecord
    from models.layout.tokens import TemplateLengths

    class Source:
        def __init__(self) -> None:
            self.classes = {}
            for name, count in counts.items():
                entry = ClassManifest(
                    resolution=name, buckets=[(16 * GRIDS[name][0], 16 * GRIDS[name][1])], first_shard=0,
                    shards=-(-count // SHARD), first_sample=0, raw_samples=count, samples=count,
                    side=str(name),
                )  # fmt: skip
                files = {file: folder / str(name) / file for file in SIDE_FILES}
                self.classes[name] = load_class_index(files, entry, 16)

        def record(self, resolution: int, sample_id: int) -> LatentRecord:
            raise NotImplementedError

    before, anonymous = memory("VmRSS"), memory("RssAnon")
    begin, begin_cpu = time.perf_counter(), time.process_time()
    recipe = BatchRecipe(global_batch_size=BATCH, ratio=MIX, max_tokens=16384)
    plan = BatchPlan(recipe, Source(), 4, TemplateLengths(3, 2, 3), 64, SampleCost(28e9))
    plan.step(0)
    first, first_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    steps_per_epoch = sum(counts.values()) // BATCH
    same_epoch = np.random.default_rng(0).integers(0, steps_per_epoch, 100)
    times, computing, jumps = [], [], []
    for step in same_epoch.tolist():
        begin, begin_cpu = time.perf_counter(), time.process_time()
        plan.step(step)
        times.append(time.perf_counter() - begin)
        computing.append(time.process_time() - begin_cpu)
    for epoch in range(1, 11):
        begin = time.perf_counter()
        plan.step(int(same_epoch[epoch]) + 37 * epoch * steps_per_epoch)
        jumps.append(time.perf_counter() - begin)
    return {
        "first batch (s)": first,
        "  of it computing (s)": first_cpu,
        "a step, median (ms)": 1000 * float(np.median(times)),
        "  of it computing (ms)": 1000 * float(np.median(computing)),
        "a step, slowest of 100 (ms)": 1000 * max(times),
        "a jump to another epoch, median (ms)": 1000 * float(np.median(jumps)),
        "memory before (MB)": before,
        "memory added, peak (MB)": memory("VmHWM") - before,
        "memory added without files (MB)": memory("RssAnon") - anonymous,
    }


def write_streaming_index(folder: Path, samples: int) -> None:
    common = {
        "column_encodings": ["bytes"],
        "column_names": ["bits"],
        "column_sizes": [None],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": 1 << 26,
        "version": 2,
        "zip_data": None,
    }
    shards = [
        common
        | {
            "samples": min(SHARD, samples - begin),
            "raw_data": {"basename": f"shard.{begin // SHARD:05d}.mds", "bytes": 1 << 26, "hashes": {}},
        }
        for begin in range(0, samples, SHARD)
    ]
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def measure_streaming(folder: Path) -> dict[str, float]:
    from data_pipeline.streaming_import import StreamingDataset

    before, shared = memory("VmRSS"), _shared_memory()
    begin = time.perf_counter()
    dataset = StreamingDataset(
        remote=str(folder), local=str(folder / "local"), shuffle=True, shuffle_algo="py1e", batch_size=40,
        num_canonical_nodes=8,
    )  # fmt: skip
    built = time.perf_counter() - begin
    built_cpu = time.process_time()
    # What `iter` does before it fetches the first sample.
    dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()
    dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
    dataset._get_work(*dataset._resume_incr_epoch())
    return {
        "constructor (s)": built,
        "order of the first epoch (s)": time.perf_counter() - begin - built,
        "  of it computing (s)": time.process_time() - built_cpu,
        "memory added, peak (MB)": memory("VmHWM") - before,
        "shared memory kept (MB)": _shared_memory() - shared,
    }


def _shared_memory() -> float:
    return sum(path.stat().st_size for path in Path("/dev/shm").iterdir() if path.is_file()) / 2**20


def in_process(*arguments: str) -> dict[str, float] | str:
    """Run this script in a process of its own; its figures, or why there are none."""
    with tempfile.TemporaryDirectory(prefix="order-") as private:
        environment = dict(os.environ, TMPDIR=private)
        try:
            done = subprocess.run(
                [sys.executable, __file__, *arguments],
                capture_output=True, text=True, timeout=TIME_LIMIT, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done after {TIME_LIMIT} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, figures: dict[str, float] | str) -> bool:
    print(title)
    if isinstance(figures, str):
        print(f"  {figures}")
        return False
    for name, value in figures.items():
        print(f"  {name:<40} {value:10.2f}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--streaming", type=int, nargs="*", default=[10**6, 10**7, 10**8])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        # Half of the machine's memory: a peer that needs more shall fail, not the machine.
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        what, folder = arguments.measure[0], Path(arguments.measure[1])
        if what == "ours":
            counts = {int(k): v for k, v in json.loads((folder / "counts.json").read_text()).items()}
            print(json.dumps(measure_ours(folder, counts)))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            print(json.dumps(measure_streaming(folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        counts = write_side_index(Path(name), arguments.samples)
        (Path(name) / "counts.json").write_text(json.dumps(counts))
        show(f"ours, {arguments.samples:,} samples", in_process("--measure", "ours", name))
    for samples in arguments.streaming:
        with tempfile.TemporaryDirectory() as name:
            write_streaming_index(Path(name), samples)
            if not show(f"streaming, {samples:,} samples", in_process("--measure", "streaming", name)):
                break


if __name__ == "__main__":
    main()
