"""The optimizer's step on a CPU: AdamW in one pass (`fused`, which training takes there) against torch's
default, one operation after the other; and the norm and the clipping of the gradient before it.

    python benchmarks/host_optimizer.py [--elements 50000000]

Nanoseconds of processor time an element, on one thread. `bitdance plan` counts the sum of norm, clipping and
fused AdamW for each parameter of a rank whose optimizer is in host memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

REPEATS = 5


def nanoseconds(step: Callable[[], object], elements: int) -> float:
    """The best of some repetitions, after one to warm up."""
    step()
    times = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        step()
        times.append(time.thread_time() - begin)
    return min(times) / elements * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=50_000_000)
    elements = parser.parse_args().elements
    torch.set_num_threads(1)
    weights = torch.zeros(elements, requires_grad=True)
    gradient = weights.grad = torch.randn(elements)
    costs = {
        "norm": nanoseconds(lambda: torch._foreach_norm([gradient]), elements),
        "clipping": nanoseconds(lambda: gradient.mul_(0.999), elements),
    }
    for fused in (True, False):
        adam = torch.optim.AdamW([weights], lr=1e-4, betas=(0.9, 0.95), eps=1e-15, fused=fused)
        costs["AdamW, fused" if fused else "AdamW, default"] = nanoseconds(adam.step, elements)
        del adam
    for name, cost in costs.items():
        print(f"{name:<16}{cost:6.2f} ns an element")
    counted = sum(cost for name, cost in costs.items() if name != "AdamW, default")
    print(f"{'sum, fused':<16}{counted:6.2f} ns an element")
    print(f"{'ratio':<16}{costs['AdamW, default'] / costs['AdamW, fused']:6.1f} (AdamW, default / fused)")


if __name__ == "__main__":
    main()
