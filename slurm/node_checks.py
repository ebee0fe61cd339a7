"""What a node is asked before it may train: each check gives problems in words, or facts to compare.

Imports no torch; what needs it is in `interconnect.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from foundation.provenance import PACKAGES, package_version
from trainer.recipe import StageRecipe

VISIBLE_SECONDS = 15.0  # a shared file system may show a new file to other nodes this much later


@dataclass(frozen=True)
class Limits:
    """Below (or above) which a node counts as bad; 0 switches the check off, but clock skew's.

    Attributes:
        min_disk_gb: free in the folder for temporary files, 1e9 bytes.
        min_memory_gb: available, 1e9 bytes.
        max_clock_skew: seconds from the middle one of all nodes.
        min_gpu_tflops: of a bfloat16 matrix product on one GPU, 1e12 FLOP/s.
        min_allreduce_gbps: bus bandwidth, 1e9 bytes/s.
        patience: seconds in which all ranks must have answered.
    """

    min_disk_gb: float = 2.0
    min_memory_gb: float = 1.0
    max_clock_skew: float = 5.0
    min_gpu_tflops: float = 0.0
    min_allreduce_gbps: float = 0.0
    patience: float = 300.0


def add_limits(parser: argparse.ArgumentParser) -> None:
    """An option for each limit."""
    limits = parser.add_argument_group("preflight: a node counts as bad below (above) these")
    for f in fields(Limits):
        limits.add_argument(f"--{f.name.replace('_', '-')}", type=float, default=f.default)


@dataclass
class Report:
    """What one rank has found.

    Attributes:
        problems: with this node, in words.
        facts: what must be the same on all nodes.
        measured: figures for the log.
    """

    node: str
    rank: int
    problems: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def check_node(report: Report, recipe: StageRecipe, limits: Limits, token: Path) -> None:
    """Disk, memory, network interface, paths and versions of the node that this process runs on.

    Args:
        token: a file that rank 0 has just made in the run folder.
    """
    report.facts |= versions()
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    report.measured["disk_gb"] = round(free, 1)
    if free < limits.min_disk_gb:
        report.problems.append(
            f"{free:.1f} GB are free in {tempfile.gettempdir()}, {limits.min_disk_gb:g} are needed"
        )
    memory = available_memory() / 1e9
    report.measured["memory_gb"] = round(memory, 1)
    if memory < limits.min_memory_gb:
        report.problems.append(f"{memory:.1f} GB of memory are available, {limits.min_memory_gb:g} needed")
    for key, folder in named_folders(recipe).items():
        if not folder.exists():
            report.problems.append(f"{key}: it sees no {folder}")
    check_latents(report, recipe.data.latents)
    there = {name for _, name in socket.if_nameindex()}
    for interface in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if interface not in there:
            report.problems.append(f"NETWORK_INTERFACE: it has no {interface}")
    if not appears(token, VISIBLE_SECONDS):
        report.problems.append(f"run: it does not see what the first node has written to {token.parent}")


def check_latents(report: Report, latents: str) -> None:
    """Whether the dataset can be reached, and is the one that the other nodes see."""
    import fsspec

    place = f"{latents}/manifest.json"
    if "://" not in latents and not Path(latents).exists():
        return  # said already
    try:
        with fsspec.open(place, "rb") as file:
            report.facts["latents"] = hashlib.sha256(file.read()).hexdigest()[:12]
    except FileNotFoundError:
        report.problems.append(f"data.latents: {latents} has no manifest.json")
    except Exception as error:  # noqa: BLE001  (each store has errors of its own)
        report.problems.append(f"data.latents: {place} cannot be read ({error})")


def named_folders(recipe: StageRecipe) -> dict[str, Path]:
    """The local folders that a recipe reads, by key."""
    values = {
        "tokenizer": recipe.tokenizer,
        "data.latents": recipe.data.latents,
        "model.init_from": recipe.model.init_from,
        "model.random.text_tokenizer": recipe.model.random.text_tokenizer if recipe.model.random else None,
    }
    # What looks like neither a path nor an address may be a name on the hub.
    return {
        key: Path(value)
        for key, value in values.items()
        if value is not None and "://" not in value and not value.startswith("hf:")
    }


def versions() -> dict[str, str]:
    """Interpreter and packages, as facts."""
    packages = ", ".join(f"{name} {package_version(name)}" for name in PACKAGES)
    return {"python": f"{platform.python_version()} ({sys.executable})", "packages": packages}


def available_memory() -> int:
    """Bytes, as the kernel says."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


def appears(path: Path, seconds: float) -> bool:
    """Whether a file that another node has written is, or becomes, visible here."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.listdir(path.parent)  # makes NFS look again
        except OSError:
            return False
        if path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
