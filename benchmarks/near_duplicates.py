"""Near-duplicates among n perceptual hashes, out of core: seconds and memory.

    python benchmarks/near_duplicates.py --hashes 5000000 --memory 4GB [--flat 100000]

Random hashes, and a tenth of them copies of others with 1 to 3 bits flipped, which have to be found. With
--flat, so many of them are those of flat pictures instead, which share 40 of their 64 bits. The comparison is
plain banding (four blocks of 16 bits, one has to agree), whose candidate pairs are counted and not formed:
their number grows with the square of n.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time

import duckdb
import numpy as np

from data_pipeline.near_duplicates import block_masks, find_near_duplicates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hashes", type=int, default=5_000_000)
    parser.add_argument("--flat", type=int, default=0)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    count, copies = arguments.hashes, arguments.hashes // 10
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    flat = slice(copies, copies + arguments.flat)
    hashes[flat] = hashes[flat] >> np.uint64(40) | np.uint64(0xAAAAAAAAAA000000)
    for flip in range(3):  # the same bit twice is no flip: 1 to 3 bits in the end
        bits = np.uint64(1) << rng.integers(0, 64, copies).astype(np.uint64)
        hashes[-copies:] = (hashes[:copies] if flip == 0 else hashes[-copies:]) ^ bits
    with tempfile.TemporaryDirectory() as spill:
        settings = {"memory_limit": arguments.memory, "threads": arguments.threads, "temp_directory": spill}
        connection = duckdb.connect(config=settings)
        connection.register("given", {"rank": np.arange(count, dtype=np.uint64), "phash": hashes})
        connection.execute("CREATE TEMP TABLE pictures AS SELECT * FROM given")
        started = time.monotonic()
        found = find_near_duplicates(connection, "SELECT * FROM pictures", 3, "losers")
        seconds = time.monotonic() - started
        exact = connection.execute(f"SELECT count(*) FROM losers WHERE rank >= {count - copies}").fetchall()
    joins = len(block_masks(3, 2**64 - 1))
    print(f"{count:,} hashes, {joins} joins: {seconds:.0f} s, {count / seconds:,.0f} hashes/s")
    print(f"{found:,} left out; of {copies:,} planted copies {exact[0][0]:,} were found")
    banding = 4 * count * count / 2 / 2**16
    print(f"plain banding would compare {banding:,.0f} pairs, {banding / count:,.0f} for each hash")
    print(f"greatest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
