"""How long a save holds training up, and how long its write goes on beside it.

    python benchmarks/checkpoint_stall.py [--gigabytes 1.0] [--repeats 3]

One rank with a state of float32 tensors: weights and two moments of equal sizes. `stall` is the call that
training waits for; `until committed` goes on until manifest, hashes and rename are on disk. Beside it
stands what a user would do instead: `torch.save` of the same tensors, and an fsync, while training waits.
Medians.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

if __package__ in (None, ""):  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.checkpoint import Checkpoints
from trainer.flat_shards import FlatShard
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.run_folder import RunFolder, take_start

TENSORS = 24
KINDS = ("master", "exp_avg", "exp_avg_sq")


def state_of(gigabytes: float) -> dict[str, FlatShard]:
    """Random tensors of so many 1e9 bytes, as the trainer names them."""
    size = int(gigabytes * 1e9 / 4 / TENSORS)
    names = [f"{kind}/layer.{n}" for kind in KINDS for n in range(TENSORS // len(KINDS))]
    return {name: FlatShard(torch.randn(size), 0, size) for name in names}


def save_ours(run: RunFolder, checkpoints: Checkpoints, shards: dict[str, FlatShard], step: int) -> tuple:
    """(stall, until committed) in seconds."""
    started = time.perf_counter()
    checkpoints.save(step, shards, {})
    stall = time.perf_counter() - started
    checkpoints.wait()
    whole = time.perf_counter() - started
    assert (run.checkpoints / f"step-{step}").is_dir(), "the save failed"
    return stall, whole


def save_plainly(path: Path, shards: dict[str, FlatShard]) -> float:
    """Seconds of torch.save and an fsync."""
    started = time.perf_counter()
    with open(path, "wb") as file:
        torch.save({name: shard.values for name, shard in shards.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def main(gigabytes: float, repeats: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-stall-"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        run = RunFolder(folder / "run")
        run.checkpoints.mkdir(parents=True)
        run.starts.mkdir()
        start = take_start(run, 0, 1)
        section = CheckpointSection(keep_last=1)
        checkpoints = Checkpoints(
            run, start, section, "0" * 64, {"parent": None}, EventLog(run, start, writes=True)
        )
        shards = state_of(gigabytes)
        ours, plain = [], []
        for step in range(1, repeats + 1):
            ours.append(save_ours(run, checkpoints, shards, step))
            plain.append(save_plainly(folder / "plain.pt", shards))
    finally:
        dist.destroy_process_group()
        shutil.rmtree(folder)
    stall, whole = (statistics.median(times) for times in zip(*ours, strict=True))
    waited = statistics.median(plain)
    print(f"state of {gigabytes:g} GB, median of {repeats}")
    print(f"stall            {stall:7.3f} s   {gigabytes / stall:6.2f} GB/s")
    print(f"until committed  {whole:7.3f} s   {gigabytes / whole:6.2f} GB/s, hashed and on disk")
    print(f"torch.save       {waited:7.3f} s   all of it in training's way")
    print(f"stall / torch.save: {stall / waited:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    main(options.gigabytes, options.repeats)
