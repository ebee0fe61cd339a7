"""Does the memory of a tokenize worker grow with the number of its shards? One against forty.

    python benchmarks/tokenize_memory.py --shards 40

Each run is a process of its own: it does all shards with a stub for the encoder, and reports the greatest
memory that it ever held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

from decode import SHARD, runner, synthesize


def work(shards: int, answer: Any) -> None:
    """Do `shards` tasks; the greatest memory of this process in MiB goes into `answer`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        # The same shard again and again: its pictures must not be what the memory is measured by.
        synthesize(folder / "shards", SHARD)
        first = folder / "shards" / "00000.tar"
        for number in range(1, shards):
            (folder / "shards" / f"{number:05d}.tar").symlink_to(first)
        worker = runner(folder)
        for number in range(shards):
            worker.run(number)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=40)
    many = parser.parse_args().shards
    context = multiprocessing.get_context("spawn")
    found = []
    for shards in (1, many):
        answer = context.Queue()
        process = context.Process(target=work, args=(shards, answer))
        process.start()
        found.append(answer.get())
        process.join()
        print(f"{shards} shards of {SHARD} pictures: {found[-1]:.0f} MiB at most")
    print(f"ratio {found[1] / found[0]:.3f}")


if __name__ == "__main__":
    main()
