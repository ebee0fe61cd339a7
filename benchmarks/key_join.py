"""What a tokenize task pays to find its samples among the filter's kept rows: a scan against the index.

    python benchmarks/key_join.py --rows 3000000 --keys 10000

The scan is a semi-join of the whole table's key column. The keys are asked for in two ways: scattered over
the table, and side by side in it, as they are in shards that were downloaded from it. Processor seconds,
the best of three.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from data_pipeline.ingest.kept import KeptRows, index_folder, known_scores
from data_pipeline.ingest.recipe import KeepSection
from data_pipeline.metadata.schema import SCORES


def uid(number: int) -> str:
    """The key of a row."""
    return hashlib.md5(str(number).encode()).hexdigest()


def synthesize(path: Path, rows: int) -> None:
    """A table like the filter's, with 32-digit uids and captions of realistic length."""
    scores = ", ".join(f"random() AS {name}" for name in SCORES)
    duckdb.execute(
        f"COPY (SELECT md5(i::VARCHAR) AS uid, 'a photograph of ' || md5((i * 7)::VARCHAR) || "
        f"' in the evening light' AS caption, {scores} FROM range({rows}) t(i)) "
        f"TO '{path}' (FORMAT parquet, COMPRESSION zstd)"
    )


def scan(path: Path, keys: list[str]) -> dict[str, Any]:
    """What `KeptRows.rows` answers, by a semi-join that reads the whole key column."""
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("wanted", pa.table({"key": keys}))
        columns = ", ".join(("uid", "caption", *SCORES))
        query = f"SELECT {columns} FROM read_parquet('{path}') WHERE uid IN (SELECT key FROM wanted)"
        return {
            key: {"caption": caption, "scores": known_scores(zip(SCORES, values, strict=True))}
            for key, caption, *values in connection.execute(query).fetchall()
        }


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Processor seconds of the fastest of several runs."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--keys", type=int, default=10_000)
    arguments = parser.parse_args()
    rows, count = arguments.rows, arguments.keys
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "kept.parquet"
        synthesize(path, rows)
        started = time.monotonic(), time.process_time()
        index = index_folder(KeepSection(rows=str(path), by="uid"))
        clock, cpu = time.monotonic() - started[0], time.process_time() - started[1]
        size = sum(file.stat().st_size for file in index.iterdir())
        print(f"index, once: {clock:.1f} s, {cpu:.1f} of processor time, {size / rows:.0f} bytes a row")
        kept = KeptRows("uid", index)
        scattered = np.random.default_rng(0).choice(rows, count, replace=False).tolist()
        start = rows // 3
        for name, numbers in ("scattered", scattered), ("side by side", range(start, start + count)):
            keys = [uid(number) for number in numbers]
            assert kept.rows(keys) == scan(path, keys)
            by_scan = seconds(lambda keys=keys: scan(path, keys))
            by_index = seconds(lambda keys=keys: kept.rows(keys))
            print(
                f"{count} of {rows} rows, {name}: scan {by_scan:.3f} s, index {by_index:.3f} s, "
                f"ratio {by_scan / by_index:.1f}"
            )


if __name__ == "__main__":
    main()
