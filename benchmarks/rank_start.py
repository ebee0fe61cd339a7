"""How long the ranks of a Slurm job take from their processes' start to the first step, and what CPU that is.

    python benchmarks/rank_start.py [--ranks 2] [--repeats 3]

Starts `python -m slurm.rank` as srun does (preflight included) on a tiny model, without a cluster. The first
start makes the run; those that are measured go on from its checkpoint, as after a fault. `CPU` is one rank's.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "trainer"))

from small_stage import make_inputs, write_recipe  # the tests' maker of small datasets

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds for a start


def start_ranks(recipe: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """One process per rank, with what srun and the batch script would have put into its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NTASKS": str(ranks),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "slurm.rank", str(recipe), "--nodes", "n1"],
            cwd=ROOT,
            env=common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """What a process has computed until now, its threads included."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_done(run: Path) -> int:
    """Whole lines of the run's metrics."""
    path = run / "metrics.jsonl"
    return len([line for line in path.read_text().splitlines() if json.loads(line)]) if path.exists() else 0


def measure(folder: Path, recipe: Path, ranks: int) -> tuple[float, float]:
    """Seconds to a start's first step, and a rank's CPU seconds until then; it saves and ends after that."""
    run = folder / "run"
    before, started = steps_done(run), time.perf_counter()
    processes = start_ranks(recipe, ranks)
    while steps_done(run) <= before:
        assert all(process.poll() is None for process in processes), f"a rank has died: see {run}/logs"
        assert time.perf_counter() - started < PATIENCE, "no step"
        time.sleep(0.02)
    wall = time.perf_counter() - started
    cpu = statistics.mean(map(cpu_seconds, processes))
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    for process in processes:
        process.wait()
    return wall, cpu


def main() -> None:
    """Print the measured starts and their median."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        recipe = write_recipe(folder, steps=1_000_000)
        measure(folder, recipe, options.ranks)
        found = [measure(folder, recipe, options.ranks) for _ in range(options.repeats)]
    for wall, cpu in found:
        print(f"first step after {wall:5.1f} s, CPU {cpu:5.1f} s")
    wall, cpu = (statistics.median(values) for values in zip(*found, strict=True))
    print(f"median: {wall:.1f} s, CPU {cpu:.1f} s for each of {options.ranks} ranks")


if __name__ == "__main__":
    main()
