"""Submits small runs to the test cluster by `bitdance submit`, and looks at what becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_cluster import Cluster, wait_until
from small_stage import write_recipe
from whole_runs import COMPUTED

ROOT = Path(__file__).parents[2]
STEPS = 40
EVERY = 5  # steps between checkpoints
PATIENCE = 600.0  # seconds; where every core has ten processes waiting for it, a start takes minutes


def bare_on(node: str) -> str:
    """For `Lab.interpreter`: on one node it is a Python without packages."""
    return f'[ "$SLURMD_NODENAME" = {node} ] && exec {sys.executable} -S "$@"'


@dataclass
class Lab:
    """The cluster with inputs to train on.

    Attributes:
        folder: of inputs and runs, which all nodes see.
    """

    cluster: Cluster
    folder: Path

    def site(self, **more: str) -> Path:
        """A site file for the test cluster."""
        values = {"PARTITION": "main", "SHARED_FOLDERS": f"{ROOT}:{self.folder}:{sys.prefix}:/tmp"}
        values |= {"GPUS_PER_NODE": "0", "CPUS_PER_TASK": "1", "MEMORY_PER_NODE": "2G"}
        values |= {"DATA_OPTIONS": "--mem=2G"} | more
        if self.cluster.namespaces:
            values["NETWORK_INTERFACE"] = "eth0"
        lines = [f'{key}="{value}"' for key, value in values.items()]
        path = self.folder / f"site-{len(list(self.folder.glob('site-*')))}.env"
        path.write_text("\n".join([*lines, "export OMP_NUM_THREADS=1"]) + "\n")
        return path

    def interpreter(self, first: str = "") -> Path:
        """Our Python under a name in a folder of its own, so that a node may lack it.

        Args:
            first: what the shell does before.
        """
        path = self.folder / f"interpreter-{len(list(self.folder.glob('interpreter-*')))}" / "python"
        path.parent.mkdir()
        path.write_text(f'#!/bin/sh\n{first}\nexec {sys.executable} "$@"\n')
        path.chmod(0o755)
        return path

    def recipe(self, name: str, **changes: Any) -> Path:
        """A recipe whose run folder has the same name."""
        settings = {"steps": STEPS, "checkpoints__every_steps": EVERY, "run": str(self.folder / name)}
        return write_recipe(self.folder, f"{name}.yaml", **(settings | changes))

    def bitdance(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One command on the login node."""
        return subprocess.run(
            [sys.executable, "-m", "bitdance", *arguments],
            cwd=ROOT,
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def command(self, log: Path, *options: str, **environment: str) -> int:
        """Number of a job by plain sbatch that prints the help of `bitdance data`.

        Args:
            environment: what else the shell has in which sbatch is called.
        """
        memory = ("--partition=main", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G")
        script = ("slurm/command.sbatch", "data", "--help")
        done = subprocess.run(
            ["sbatch", "--parsable", *memory, *options, f"--output={log}", *script],
            cwd=ROOT,
            env=self.cluster.environment | {"PYTHON": sys.executable} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    def submit(self, name: str, *options: str, site: Path | None = None, **changes: Any) -> Run:
        """Submit a small stage on two nodes, unless the options say otherwise."""
        nodes = () if "--nodes" in options else ("--nodes", "2")
        recipe = self.recipe(name, **changes)
        done = self.bitdance("submit", str(recipe), "--site", str(site or self.site()), *nodes, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(self.cluster, self.folder / name)


@dataclass
class Run:
    """A submitted run."""

    cluster: Cluster
    path: Path

    @property
    def number(self) -> int:
        return int(self.history("submitted")[-1]["job"])

    def history(self, event: str) -> list[dict[str, Any]]:
        return [line for line in lines(self.path / "slurm" / "history.jsonl") if line["event"] == event]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in lines(self.path / "events.jsonl") if line["event"] == name]

    def metrics(self) -> list[dict[str, Any]]:
        return lines(self.path / "metrics.jsonl")

    def curve(self) -> list[tuple[Any, ...]]:
        """What the steps computed."""
        return [tuple(line.get(key) for key in COMPUTED) for line in self.metrics()]

    def log(self) -> str:
        path = self.path / "slurm" / f"{self.number}.log"
        return path.read_text() if path.exists() else ""

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def wait(self, happened: Callable[[], object], what: str, seconds: float = PATIENCE) -> float:
        """Wait for something; where it does not happen, the job's log is in the message."""
        try:
            return wait_until(lambda: happened() or self.over(), seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.job(self.number)}\n{self.log()}") from None
        finally:
            assert happened(), f"{what} never happened\n{self.log()}"

    def over(self) -> bool:
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: any(line["step"] >= step for line in self.metrics()), f"step {step}")

    def wait_for_end(self) -> None:
        """Until the job has ended well."""
        self.wait(lambda: self.state() == "COMPLETED", "its good end")

    def nodes(self) -> list[str]:
        """Those of the latest start."""
        return self.cluster.run("scontrol", "show", "hostnames", self.history("start")[-1]["nodes"]).split()

    def batch_host(self) -> str:
        return self.cluster.job(self.number)["BatchHost"]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that are whole."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
