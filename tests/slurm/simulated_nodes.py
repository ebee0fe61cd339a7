"""A job of several nodes as threads of one process: each is a rank, and measures what its node is to have.

Reports go through a store in memory; collectives go over a network that is simulated, in its own time.
"""

from __future__ import annotations

import platform
import shutil
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from small_stage import recipe_values

from slurm import interconnect, node_checks, preflight
from slurm.node_checks import Limits
from trainer.recipe import StageRecipe

WAIT = 20.0  # seconds after which ranks that miss each other give up


@dataclass(frozen=True)
class Node:
    """What is measured on a node.

    Attributes:
        gpus: that torch sees, of two that the job has.
        shown: which of them srun shows to a rank, by number.
        tflops: of the first and the second GPU.
        clock: seconds ahead of the true time.
        link: 1e9 bytes/s.
        interfaces: of the network.
        view: where the run, the tokenizer and the latents are for it; None for where they are.
        silent: ranks on it that never answer.
    """

    disk_gb: float = 100.0
    memory_gb: float = 100.0
    gpus: int = 2
    shown: str = "0,1"
    tflops: tuple[float, float] = (700.0, 700.0)
    clock: float = 0.0
    link: float = 10.0
    interfaces: tuple[str, ...] = ("lo", "ib0", "ib1")
    python: str = "3.11.9"
    view: Path | None = None
    silent: tuple[int, ...] = ()


class Here(threading.local):
    """The node and rank that a thread stands for; how often it has sent, and the seconds that this took."""

    node = Node()
    rank = 0
    sent = 0
    elapsed = 0.0


class Network:
    """As much of torch.distributed as the preflight uses: to send takes as long as the links need, and every
    second time twice as long.
    """

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, here: Here, ranks: int, links: list[float]) -> None:
        self.here, self.ranks, self.links = here, ranks, links
        self.meeting = threading.Barrier(ranks, timeout=WAIT)
        self.slots = [torch.empty(0)] * ranks
        self.mail = {(a, b): Queue[int]() for a in range(ranks) for b in range(ranks)}

    def get_rank(self) -> int:
        return self.here.rank

    def get_world_size(self) -> int:
        return self.ranks

    def barrier(self) -> None:
        self.meeting.wait()

    def all_reduce(self, tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        self.slots[self.here.rank] = tensor.clone()
        self.meeting.wait()
        together = torch.stack(self.slots)
        tensor.copy_(together.amin(0) if op == self.ReduceOp.MIN else together.sum(0))
        self.meeting.wait()
        self._send(2 * (self.ranks - 1) / self.ranks * tensor.nbytes, self.here.node.link)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.slots[self.here.rank] = tensor.clone()
        self.meeting.wait()
        tensor.copy_(self.slots[src])
        self.meeting.wait()

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        self.mail[self.here.rank, peer].put(tensor.nbytes)
        self._send(tensor.nbytes, min(self.here.node.link, self.links[peer]))

    def recv(self, tensor: torch.Tensor, peer: int) -> None:
        assert self.mail[peer, self.here.rank].get(timeout=WAIT) == tensor.nbytes
        self.here.elapsed += tensor.nbytes / min(self.here.node.link, self.links[peer]) / 1e9

    def _send(self, count: float, link: float) -> None:
        self.here.elapsed += count / link / 1e9 * (1 + self.here.sent % 2)
        self.here.sent += 1


def simulate(
    monkeypatch: pytest.MonkeyPatch, folder: Path, nodes: dict[str, Node], limits: Limits
) -> list[preflight.Verdict]:
    """The verdicts of all ranks that answer, two on each node."""
    here = Here()
    ranks = [(name, node, local) for name, node in nodes.items() for local in range(2)]
    network = Network(here, len(ranks), [node.link for _, node, _ in ranks])
    for target, name, stand_in in stand_ins(here, network):
        monkeypatch.setattr(target, name, stand_in)

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0,ib1")

    def rank(number: int) -> preflight.Verdict:
        name, here.node, local = ranks[number]
        here.rank = number
        view = here.node.view or folder
        values = recipe_values(view) | {"model": {"p": 4, "init_from": str(view / "export")}}
        environment = {"RANK": str(number), "WORLD_SIZE": str(len(ranks)), "LOCAL_RANK": str(local)}
        environment |= {
            "SLURM_JOB_ID": "7",
            "SLURMD_NODENAME": name,
            "SLURM_GPUS_ON_NODE": "2",
            "CUDA_VISIBLE_DEVICES": here.node.shown,
            "SLURM_LOCALID": str(local),
        }
        return preflight.preflight(StageRecipe.model_validate(values), limits, list(nodes), environment)

    answering = [number for number, (_, node, local) in enumerate(ranks) if local not in node.silent]
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(rank, answering))


def stand_ins(here: Here, network: Network) -> list[tuple[Any, str, Any]]:
    """What takes the place of each thing that measures."""
    now, store = time.time(), torch.distributed.HashStore()

    def disk(path: str) -> SimpleNamespace:
        assert path == tempfile.gettempdir()
        return SimpleNamespace(free=here.node.disk_gb * 1e9)

    clock = SimpleNamespace(time=lambda: now + here.node.clock, perf_counter=lambda: here.elapsed)
    return [
        (shutil, "disk_usage", disk),
        (node_checks, "available_memory", lambda: here.node.memory_gb * 1e9),
        (node_checks, "VISIBLE_SECONDS", 0.1),
        (platform, "python_version", lambda: here.node.python),
        (socket, "if_nameindex", lambda: list(enumerate(here.node.interfaces, start=1))),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: here.node.gpus),
        (interconnect, "training_device", lambda: torch.device("cpu")),
        (interconnect, "gpu_tflops", lambda device: here.node.tflops[here.rank % 2]),
        (interconnect, "store_of", lambda environment, rank, ranks, seconds: store),
        (interconnect, "start_group", lambda store, rank, ranks: None),
        (interconnect, "MESSAGE_BYTES", {"cpu": 1 << 16}),
        (interconnect, "dist", network),
        (interconnect, "time", clock),
        (torch.distributed, "destroy_process_group", lambda: None),
        (preflight, "LEAVE_SECONDS", 0.5),
    ]
