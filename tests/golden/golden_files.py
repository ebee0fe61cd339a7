"""Where the golden vectors are, and how a test gets one.

Golden files hold inputs, parameters and outputs of the published models on tiny configurations. They are no
part of this repository: the environment variable GOLDEN_DIR names their folder (default `../shared/golden`,
relative to the repository's root), and without it the tests skip. Use:

    @pytest.mark.parametrize("golden", golden_files("tokenizer_"))
    def test_x(golden: Golden) -> None: ...

with `from golden_files import Golden, golden_files` (pytest puts this folder on the import path).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

KINDS = (
    "tokenizer_",
    "tokenizer_gan_",
    "group_lfq_",
    "head_t2i_",
    "projector",
    "positions_2d",
    "mask_packed_",
    "t2i_",
    "c2i_",
)
REPOSITORY = Path(__file__).resolve().parents[2]


def golden_folder() -> Path:
    """The folder of golden files; a relative GOLDEN_DIR counts from the repository's root."""
    return (REPOSITORY / os.environ.get("GOLDEN_DIR", "../shared/golden")).resolve()


def kind_of(name: str) -> str | None:
    """The longest known kind that `name` starts with: `tokenizer_gan_x` is no `tokenizer_`."""
    matching = [kind for kind in KINDS if name.startswith(kind)]
    return max(matching, key=len, default=None)


@dataclass(frozen=True)
class Golden:
    """One golden file. `config` is its JSON metadata (sizes and seeds), `names` all of its tensors' names."""

    path: Path
    config: dict[str, Any]
    names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            return cls(path, json.loads(file.metadata()["config"]), tuple(file.keys()))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor; float16 is widened to float32 (the parameters' storage type, exact)."""
        with safe_open(self.path, "pt") as file:
            value: torch.Tensor = file.get_tensor(name)
        return value.float() if value.dtype == torch.float16 else value

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose name starts with `prefix`, without it: `group("param.")` is a state dict."""
        return {
            name.removeprefix(prefix): self.tensor(name) for name in self.names if name.startswith(prefix)
        }


def golden_files(kind: str) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: every file of `kind`, or one that skips and says why."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of golden file {kind!r}, known: {', '.join(KINDS)}")
    folder = golden_folder()
    paths = [path for path in sorted(folder.glob("*.safetensors")) if kind_of(path.name) == kind]
    if paths:
        return [pytest.param(Golden.open(path), id=path.stem) for path in paths]
    missing = "no such folder" if not folder.is_dir() else f"it holds no {kind}*.safetensors"
    reason = f"golden vectors not found in {folder} ({missing}); set GOLDEN_DIR to their folder"
    return [pytest.param(None, id=f"no-{kind}", marks=pytest.mark.skip(reason=reason))]


def settling(draw: Callable[..., Tensor], golden_patches: Iterable[Tensor]) -> Callable[..., Tensor]:
    """A head's `sample`, with the golden sign where its own is open: within 1e-4 of 0.

    golden_patches: the bits [images, P, C] of each step; both halves of a batch take the same.
    """
    patches = iter(golden_patches)

    def draw_and_settle(*args: Any, **kwargs: Any) -> Tensor:
        drawn, golden_bits = draw(*args, **kwargs), next(patches)
        halves = drawn.shape[0] // golden_bits.shape[0]
        return torch.where(drawn.abs() < 1e-4, golden_bits.repeat(halves, 1, 1), drawn)

    return draw_and_settle
