"""Rows a second of `bitdance data filter`: five threshold rules over synthetic LAION-Aesthetics tables.

    python benchmarks/metadata_filter.py --rows 5000000 --threads 2 [--deduplicate] [--memory 4GB]

The comparison is the same five conditions as one DuckDB `COPY`, without a funnel: what a user would write
by hand.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import duckdb

from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import FilterRecipe

RULES = [
    {"rule": "score", "column": "aesthetic", "min": 5.0},
    {"rule": "score", "column": "watermark", "below": 0.5},
    {"rule": "score", "column": "punsafe", "below": 0.1},
    {"rule": "score", "column": "similarity", "min": 0.28},
    {"rule": "size", "shorter_min": 512},
]
BY_HAND = (
    "AESTHETIC_SCORE >= 5 AND pwatermark < 0.5 AND punsafe < 0.1 AND similarity >= 0.28 "
    "AND least(WIDTH, HEIGHT) >= 512"
)


DUPLICATES = 5  # one row in so many has the url of another, far away


def synthesize(folder: Path, rows: int) -> None:
    """Tables of a million rows with urls and captions of realistic length."""
    distinct = rows - rows // DUPLICATES
    for start in range(0, rows, 1_000_000):
        count = min(1_000_000, rows - start)
        file = folder / f"{start:012d}.parquet"
        duckdb.execute(
            "COPY (SELECT "
            "'https://images.site' || (n % 50000) || '.example/photo/' || md5(n::VARCHAR) || '.jpg' AS URL, "
            "'a photograph of ' || md5((i * 7)::VARCHAR) || ' in the evening light' AS TEXT, "
            "(200 + random() * 1800)::DOUBLE AS WIDTH, (200 + random() * 1800)::DOUBLE AS HEIGHT, "
            "random() * 0.5 AS similarity, random()::FLOAT AS punsafe, random()::FLOAT AS pwatermark, "
            "(3 + random() * 4)::FLOAT AS AESTHETIC_SCORE, (hash(i) >> 1)::BIGINT AS hash "
            f"FROM (SELECT i, i % {distinct} AS n FROM range({start}, {start + count}) t(i))) "
            f"TO '{file}' (FORMAT parquet)"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--deduplicate", action="store_true", help="only: one row per url, over all rows")
    arguments = parser.parse_args()
    best = {"column": "aesthetic"}
    one_per_url = {"rule": "deduplicate", "by": "url", "prefer": [best]}
    rules = [one_per_url] if arguments.deduplicate else RULES
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        synthesize(folder, arguments.rows)
        recipe = FilterRecipe.model_validate(
            {
                "sources": [f"{folder}/*.parquet"],
                "output": f"{folder}/out",
                "rules": rules,
                "engine": {"memory": arguments.memory, "threads": arguments.threads},
            }
        )
        cpu = time.process_time()
        funnel = run_filter(recipe)
        cpu = time.process_time() - cpu
        print(f"filter: {arguments.rows / funnel.seconds:,.0f} rows/s on {arguments.threads} threads")
        # What the same work makes of cores that nobody else uses.
        print(f"filter: {arguments.rows / cpu:,.0f} rows per second of one core's time")
        if arguments.deduplicate:
            assert funnel.kept == arguments.rows - arguments.rows // DUPLICATES
        else:
            started = time.monotonic()
            duckdb.execute(f"SET threads = {arguments.threads}")
            duckdb.execute(
                f"COPY (SELECT * FROM '{folder}/0*.parquet' WHERE {BY_HAND}) TO '{folder}/hand.parquet' "
                "(FORMAT parquet, COMPRESSION zstd)"
            )
            print(f"one COPY by hand: {arguments.rows / (time.monotonic() - started):,.0f} rows/s")
    print(f"greatest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
