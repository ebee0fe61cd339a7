"""What is known of each kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass

from foundation.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, as its maker's data sheet and a cluster's usual wiring describe it.

    Attributes:
        memory: bytes that a process can see.
        peak_flops: bfloat16 tensor-core FLOP/s, dense.
        nvlink: bytes/s that one GPU sends to others of its node, while it receives as many.
        network: bytes/s to other nodes, likewise: the GPU's share of the node's network cards.
        price: dollars an hour. A guess to be replaced by one's own (`--price`).
    """

    memory: float
    peak_flops: float
    nvlink: float
    network: float
    price: float


GPUS: dict[str, Gpu] = {
    "a100-40g": Gpu(39.5 * GIB, 312e12, 230e9, 20e9, 1.3),
    "a100-80g": Gpu(79.2 * GIB, 312e12, 230e9, 20e9, 1.6),
    "l40s-48g": Gpu(44.5 * GIB, 362e12, 20e9, 10e9, 1.0),
    "h100-80g": Gpu(79.2 * GIB, 989e12, 360e9, 40e9, 2.5),
    "h200-141g": Gpu(139.8 * GIB, 989e12, 360e9, 40e9, 3.0),
    "b200-180g": Gpu(178.3 * GIB, 2250e12, 700e9, 40e9, 5.0),
}

RESERVED = 1.5 * GIB
"""Bytes of a GPU that no tensor gets: the CUDA context, cuBLAS' workspace, NCCL's channels."""
FRAGMENTATION = 0.05
"""Share of the tensors' bytes that the caching allocator holds beyond them, with expandable segments."""


def find_gpu(name: str) -> Gpu:
    """A GPU by its name.

    Raises:
        RecipeError: it isn't known; says which are.
    """
    if name not in GPUS:
        raise RecipeError(f"--gpu {name}: expected one of {', '.join(GPUS)}")
    return GPUS[name]
