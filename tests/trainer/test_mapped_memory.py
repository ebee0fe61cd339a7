"""Tensors in files: values, sharing and layout survive the move; a full disk is said."""

import errno
import os
from pathlib import Path

import pytest
import torch

from data_pipeline.store import PlaceUnusable
from trainer.mapped_memory import MappedMemory


def test_a_move_keeps_values_layout_and_sharing(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.bfloat16)
    part, across = whole[5:17], whole.view(4, 6).T
    expected, before = across.clone(), whole.data_ptr()
    MappedMemory(str(tmp_path / "new")).move([part, whole, across])
    assert whole.data_ptr() != before
    assert torch.equal(whole, torch.arange(24, dtype=torch.bfloat16))
    assert torch.equal(across, expected)
    part.fill_(-1)
    assert whole[5:17].eq(-1).all() and whole[4] == 4 and across[5, 0] == -1


def test_files_are_gone_and_memory_stays(tmp_path: Path) -> None:
    zeros = MappedMemory(str(tmp_path)).zeros_like(torch.ones(3, 5))
    assert zeros.shape == (3, 5) and not zeros.any()
    assert not list(tmp_path.iterdir())
    zeros += 2
    assert zeros.sum() == 30


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(PlaceUnusable, match="No space left"):
        MappedMemory(str(tmp_path)).zeros_like(torch.ones(3))
    assert not list(tmp_path.iterdir())
