"""One rank of `test_engine.py`: the same small problem under every ZeRO stage; results as JSON from rank
0.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from trainer.engine import Engine, build_module, start_distributed
from trainer.peers import stop_distributed
from trainer.recipe import OffloadSection, OptimizerSection, ZeroSection

STEPS, SAMPLES, WIDTH = 6, 12, 10


class Toy(nn.Module):
    """Sizes that no number of ranks divides, and a buffer that bfloat16 would spoil."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(WIDTH, 17), nn.LayerNorm(17), nn.Linear(17, 3)
        self.register_buffer("frequencies", torch.tensor([1.00001, 3.14159]), persistent=False)
        self.shared = nn.Linear(3, 3)
        self.tie()

    def tie(self) -> None:
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.shared.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.first.weight.dtype)
        x = self.last(self.norm(torch.tanh(self.first(x))))
        # The distance to 1, not to 0: squares of numbers near 0 would magnify bfloat16's rounding.
        return (self.again(self.shared(x)).float() - 1).square().sum(-1)


def samples_of(step: int) -> torch.Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1000 + step))


def train_step(engine: Engine, step: int, spoil: bool = False) -> tuple[float, float]:
    """One step over the global batch, cut unevenly into K = 1, 2, 3 micro-batches a rank. (loss, norm)."""
    rank, ranks, micro_steps = dist.get_rank(), dist.get_world_size(), 1 + step % 3
    batch = samples_of(step)
    cuts = sorted(
        torch.randperm(SAMPLES - 1, generator=torch.Generator().manual_seed(step))[: ranks * micro_steps - 1]
        + 1
    )
    parts = torch.tensor_split(batch, [int(c) for c in cuts])
    total = torch.zeros(())
    for micro in range(micro_steps):
        part = parts[rank * micro_steps + micro]
        loss = engine(part).sum() / SAMPLES
        if spoil and rank == 0 and micro == 0:
            loss = loss * float("nan")
        total += loss.detach()
        engine.backward(loss * ranks, last=micro == micro_steps - 1)
    report = torch.stack([total, engine.squared_gradient_norm()])
    dist.all_reduce(report)
    return float(report[0]), float(report[1].sqrt())


def whole_state(engine: Engine) -> dict[str, list[float]]:
    return {name: engine.state.whole(name).flatten().tolist() for name in engine.state.parameters}


def zero_section(stage: int, device: str | None, disk: Path) -> ZeroSection:
    """Everything that the stage can offload goes to ``device``; "nvme" is the folder ``disk``.

    "copy" offloads nothing: two ranks each share a second, whole copy of the weights.
    """
    if device is None:
        return ZeroSection(stage=stage)
    if device == "copy":  # of all weights: none stays whole on each rank anyway
        return ZeroSection(stage=stage, zero_hpz_partition_size=2, stage3_param_persistence_threshold=0)
    offload = OffloadSection(device=device, nvme_path=str(disk) if device == "nvme" else None)
    return ZeroSection(stage=stage, offload_optimizer=offload, offload_param=offload if stage == 3 else None)


def on_disk(tensors: Iterable[torch.Tensor], disk: Path) -> bool:
    """Whether the memory of all of them is mapped from files in the folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(disk) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    return all(any(first <= tensor.data_ptr() < last for first, last in ranges) for tensor in tensors)


def run_stage(zero: ZeroSection, precision: str, disk: Path) -> dict:
    optimizer = OptimizerSection(lr=0.02, clip=0.5, weight_decay=0.1)
    engine = Engine(build_module(Toy, Toy.tie, zero, precision), optimizer, zero, precision)
    # Other weights than those that the other stages were built with: loading must replace them.
    engine.state.load_weights([(name, 0.9 * value) for name, value in Toy().named_parameters()])
    curve = []
    for step in range(STEPS):
        loss, norm = train_step(engine, step)
        engine.step(lr=0.02 / (1 + step))
        curve.append((loss, norm))
    before = whole_state(engine)
    _, spoiled = train_step(engine, STEPS, spoil=True)
    engine.discard_gradient()
    kept = whole_state(engine) == before and engine.state.optimizer_steps == STEPS
    after_skip = train_step(engine, STEPS + 1)
    engine.step(lr=0.01)
    coverage = torch.zeros(sum(p.numel() for p in Toy().parameters()))
    offset = 0
    for name in engine.state.parameters:
        for fragment in engine.state.fragments():
            if fragment.name == name:
                coverage[offset + fragment.start : offset + fragment.start + fragment.length] += 1
        offset += Toy().get_parameter(name).numel()
    dist.all_reduce(coverage)
    frequencies = engine._engine.module.frequencies
    states = [state for fragment in engine.state.fragments() for state in fragment.states.values()]
    weights = [p.ds_tensor for p in engine.state.parameters.values()] if zero.stage == 3 else []
    return {
        "on_disk": on_disk([*states, *weights], disk),
        "files": len(list(disk.iterdir())) if disk.exists() else 0,
        "curve": curve,
        "spoiled": spoiled,
        "kept": kept,
        "after_skip": after_skip,
        "state": whole_state(engine),
        "covered_once": bool((coverage == 1).all()),
        "buffer": [str(frequencies.dtype), *frequencies.tolist()],
    }


def main(folder: Path, cases: list[str]) -> None:
    start_distributed()
    results = {}
    for case in cases:
        stage, precision, device = (*case.split("-"), None)[:3]
        disk = folder / "disk"
        results[case] = run_stage(zero_section(int(stage), device, disk), precision, disk)
    if dist.get_rank() == 0:
        (folder / f"ranks-{dist.get_world_size()}.json").write_text(json.dumps(results))
    stop_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
