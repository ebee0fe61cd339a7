"""The part of the preflight that needs torch: GPUs, clocks, and how fast the nodes talk to each other."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from slurm.node_checks import Limits, Report
from trainer.engine import training_device

MATRIX = 8192  # a product of this size takes an H100 a millisecond and a half
ROUNDS = 5
MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
TIMEOUT = timedelta(minutes=3)


def check_gpu(report: Report, limits: Limits, environment: Mapping[str, str]) -> None:
    """Whether the GPUs that Slurm gave this job are there and, where a limit is set, fast enough."""
    given = int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    if given and (own := environment.get("CUDA_VISIBLE_DEVICES")):
        given = len(own.split(","))  # srun may show each rank a GPU of its own
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < given:
        report.problems.append(f"torch sees {seen} of the {given} GPUs that the job has on it")
        return
    if not given or not limits.min_gpu_tflops:
        return
    tflops = gpu_tflops(training_device())
    report.measured["gpu_tflops"] = round(tflops, 1)
    if tflops < limits.min_gpu_tflops:
        report.problems.append(
            f"GPU {environment.get('SLURM_LOCALID', '?')} reaches {tflops:.0f} TFLOP/s, "
            f"{limits.min_gpu_tflops:g} are needed"
        )


def gpu_tflops(device: torch.device) -> float:
    """1e12 FLOP/s of a bfloat16 matrix product, the fastest of some rounds."""
    a = torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * MATRIX**3 / min(seconds) / 1e12


def start_group(store: dist.Store, rank: int, ranks: int) -> None:
    """A process group for the preflight alone, with the backend that training uses."""
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)


def check_clocks(reports: list[Report], limits: Limits) -> None:
    """Collective: blame nodes whose clocks are far from the middle one (accurate to a barrier's delay)."""
    times = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=training_device())
    dist.barrier()
    times[dist.get_rank()] = time.time()
    dist.all_reduce(times)
    blame_clocks(reports, times.tolist(), limits.max_clock_skew)


def blame_clocks(reports: list[Report], times: list[float], allowed: float) -> None:
    """Blame nodes by what their clocks have shown at one moment, in seconds."""
    middle = statistics.median_low(times)  # a clock, not a mean of two: of two nodes that would blame both
    for report, found in zip(reports, times, strict=True):
        if abs(found - middle) > allowed:
            report.problems.append(f"its clock is {found - middle:+.1f} s off; {allowed:g} s are allowed")


def check_bandwidth(reports: list[Report], limits: Limits) -> str:
    """Collective: the all-reduce's bus bandwidth, in words; where it is too low, blame nodes by name."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return "one rank"
    device = training_device()
    message = torch.ones(MESSAGE_BYTES[device.type] // 4, device=device)
    seconds = [_timed(lambda: dist.all_reduce(message), device) for _ in range(ROUNDS)]
    # Each rank sends and receives 2(n-1)/n of the message (NVIDIA/nccl-tests, PERFORMANCE.md).
    bandwidth = 2 * (ranks - 1) / ranks * message.numel() * 4 / min(seconds[1:]) / 1e9
    agreed = torch.tensor([bandwidth], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    words = f"all-reduce {agreed.item():.2f} GB/s"
    if agreed.item() >= limits.min_allreduce_gbps:
        return words
    if blame_slow(reports, _exchanges(reports, message)):
        return words
    return f"{words}, where {limits.min_allreduce_gbps:g} are wanted, but no node stands out"


def _exchanges(reports: list[Report], message: torch.Tensor) -> dict[str, float]:
    """Collective: each node's exchange with the first one, alone, in 1e9 bytes/s."""
    leaders: dict[str, int] = {}
    for report in reports:
        leaders.setdefault(report.node, report.rank)
    hub, *others = leaders.values()
    speeds = torch.zeros(len(others), device=message.device)
    for index, leader in enumerate(others):
        dist.barrier()
        if dist.get_rank() in (hub, leader):
            seconds = min(_exchange(message, hub, leader) for _ in range(3))
            if dist.get_rank() == hub:
                speeds[index] = 2 * message.numel() * 4 / seconds / 1e9
    dist.broadcast(speeds, src=hub)
    return dict(zip(list(leaders)[1:], speeds.tolist(), strict=True))


def blame_slow(reports: list[Report], speeds: Mapping[str, float]) -> bool:
    """Blame the nodes that exchange less than half of what most do; whether there are any.

    Not measured by the limit of the all-reduce: that is of all nodes and their GPUs together.
    """
    usual = statistics.median(speeds.values()) if speeds else 0.0
    slow = {node: speed for node, speed in speeds.items() if speed < usual / 2}
    for node, speed in slow.items():
        report = next(report for report in reports if report.node == node)
        report.problems.append(
            f"it exchanges {speed:.2f} GB/s with {reports[0].node}, the others {usual:.2f}"
        )
    return bool(slow)


def _exchange(message: torch.Tensor, one: int, other: int) -> float:
    """Seconds until a message has gone from ``one`` to ``other`` and come back."""

    def there_and_back() -> None:
        if dist.get_rank() == one:
            dist.send(message, other)
            dist.recv(message, other)
        else:
            dist.recv(message, one)
            dist.send(message, one)

    return _timed(there_and_back, message.device)


def _timed(work: object, device: torch.device) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def store_of(environment: Mapping[str, str], rank: int, ranks: int, seconds: float) -> dist.TCPStore:
    """Where the ranks leave their reports: on the first node, one port above the one that training uses."""
    port = int(environment["MASTER_PORT"]) + 1
    address = environment["MASTER_ADDR"]
    return dist.TCPStore(address, port, ranks, rank == 0, timedelta(seconds=seconds), wait_for_workers=False)


def node_name(environment: Mapping[str, str]) -> str:
    """This node, as Slurm calls it."""
    return environment.get("SLURMD_NODENAME") or os.uname().nodename
