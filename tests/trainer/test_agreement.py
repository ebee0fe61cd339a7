"""What the ranks make of one another's parts of a step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import agreement
from trainer.agreement import StepReport, gather_report

PARTS: list[dict[str, Any]] = [
    {"sums": [1.0, 2.0], "squared_norm": 9.0, "data_wait": 0.5, "memory": 3e9, "stop": False},
    {"sums": [0.5, 1.0], "squared_norm": 16.0, "data_wait": 0.25, "memory": 7e9, "stop": True},
]


def report(part: dict[str, Any]) -> StepReport:
    tensors = {
        "sums": torch.tensor(part["sums"]).double(),
        "squared_norm": torch.tensor(part["squared_norm"]),
    }
    return gather_report(**{**part, **tensors}, save=False, saving=False)


def test_a_report_adds_up_the_sums_and_keeps_what_the_worst_rank_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Tensor] = []
    monkeypatch.setattr(agreement.dist, "get_world_size", lambda: len(PARTS))
    monkeypatch.setattr(agreement.dist, "all_gather", lambda rows, row: told.append(row))
    for part in PARTS:
        report(part)

    def all_gather(rows: list[Tensor], row: Tensor) -> None:
        for mine, theirs in zip(rows, told, strict=True):
            mine.copy_(theirs)

    monkeypatch.setattr(agreement.dist, "all_gather", all_gather)
    found = report(PARTS[0])
    assert found.sums.tolist() == [1.5, 3.0] and found.norm == 5.0
    assert (found.data_wait, found.memory) == (0.5, 7e9)
    assert (found.stop, found.save, found.saving) == (True, False, False)
