"""What the ranks tell one another at the end of a step's backward pass: one small gather, after which all
know all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """The same on all ranks, to the bit.

    Attributes:
        sums: float64 [n], the ranks' loss sums added up.
        norm: L2 norm of the gradient before clipping.
        data_wait: longest wait of a rank for its batch, seconds.
        memory: most that a rank has held since its start, bytes.
        stop: some rank was asked to stop.
        save: some rank finds that a save is due.
        saving: some rank has not heard the end of the last save.
    """

    sums: Tensor
    norm: float
    data_wait: float
    memory: float
    stop: bool
    save: bool
    saving: bool


def gather_report(
    sums: Tensor,
    squared_norm: Tensor,
    data_wait: float,
    memory: float,
    stop: bool,
    save: bool,
    saving: bool,
) -> StepReport:
    """Collective; the arguments are this rank's part of a `StepReport`."""
    told = torch.tensor([data_wait, memory, stop, save, saving], dtype=torch.float64, device=sums.device)
    row = torch.cat([sums, squared_norm.double().reshape(1), told])
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    table = torch.stack(rows).cpu()
    # Added up in the order of the ranks, on every rank alike: a verdict on these numbers is the same
    # everywhere.
    return StepReport(
        sums=table[:, : len(sums)].sum(0),
        norm=float(table[:, -6].sum().sqrt()),
        data_wait=float(table[:, -5].max()),
        memory=float(table[:, -4].max()),
        stop=bool(table[:, -3].any()),
        save=bool(table[:, -2].any()),
        saving=bool(table[:, -1].any()),
    )
