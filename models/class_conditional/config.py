"""Sizes of the class-conditional models, and the presets published with the paper (arXiv 2602.14041)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from models.checks import LARGEST_DEPTH, LARGEST_PATCH, LARGEST_WIDTH, is_finite, wrong_counts
from models.head import HeadConfig


@dataclass(frozen=True)
class ClassConditionalConfig:
    """One class-conditional model; raises ValueError, with all problems at once, on what cannot be built."""

    dim: int = 768  # D, width of the autoregressive model
    n_layer: int = 24
    n_head: int = 12
    diff_layers: int = 6  # blocks of the head
    diff_dim: int = 768  # W, width of the head
    diff_adanln_layers: int = 2
    latent_dim: int = 32  # C, bits per token
    down_size: int = 16  # pixels per token and side
    resolution: int = 256  # pixels per side; images are square
    diff_batch_mul: int = 4  # draws of (t, noise) per target in training
    cls_token_num: int = 64  # class tokens at the start of the sequence
    num_classes: int = 1000
    perturb_rate: float = 0.1  # p_max of the bit flips in training
    time_shift: float = 1.0  # these four are the head's, see `HeadConfig`
    time_schedule: Literal["logit_normal", "uniform"] = "logit_normal"
    P_mean: float = -0.8
    P_std: float = 0.8
    parallel_num: int = 1  # P, tokens predicted per step
    parallel_mode: Literal["patch", "standard"] = "patch"  # P x P patches, or runs of the plain raster order
    mask: Literal["block_causal", "causal"] = "block_causal"  # do tokens of a step see the later ones of it?

    def __post_init__(self) -> None:
        problems = self._bad_numbers() or self._bad_combinations()
        if problems:
            listed = "\n".join(f"- {problem}" for problem in problems)
            raise ValueError(f"this class-conditional model cannot be built:\n{listed}")
        _ = self.head  # the head's own checks

    def _bad_numbers(self) -> list[str]:
        widths = ("dim", "n_head", "diff_dim", "latent_dim", "down_size", "resolution", "num_classes")
        depths = ("n_layer", "diff_layers", "diff_adanln_layers", "diff_batch_mul")
        problems = [
            *wrong_counts(self, widths, LARGEST_WIDTH),
            *wrong_counts(self, depths, LARGEST_DEPTH),
            *wrong_counts(self, ("cls_token_num", "parallel_num"), LARGEST_PATCH),
        ]
        if not (is_finite(self.perturb_rate) and 0.0 <= self.perturb_rate <= 1.0):
            problems.append(f"perturb_rate is {self.perturb_rate!r}; expected a probability, 0 to 1")
        if self.parallel_mode not in ("patch", "standard"):
            problems.append(f"parallel_mode is {self.parallel_mode!r}; expected 'patch' or 'standard'")
        if self.mask not in ("block_causal", "causal"):
            problems.append(f"mask is {self.mask!r}; expected 'block_causal' or 'causal'")
        return problems

    def _bad_combinations(self) -> list[str]:
        problems = []
        if self.dim % self.n_head or (self.dim // self.n_head) % 4:
            problems.append(
                f"dim is {self.dim} with n_head {self.n_head}; 2D rotary positions need heads whose "
                "width is a multiple of 4"
            )
        if self.resolution % self.down_size:
            problems.append(
                f"resolution is {self.resolution}; which down_size {self.down_size} does not divide"
            )
            return problems
        if self.parallel_mode == "patch" and math.isqrt(self.parallel_num) ** 2 != self.parallel_num:
            problems.append(
                f"parallel_num is {self.parallel_num}, no square, so no patch holds that many tokens; "
                "choose 1, 4, 16, ... or parallel_mode 'standard'"
            )
        elif self.parallel_mode == "patch" and self.grid % self.patch_side:
            problems.append(
                f"the grid is {self.grid} x {self.grid} tokens (resolution / down_size), "
                f"which patches of {self.patch_side} x {self.patch_side} do not tile"
            )
        elif self.tokens % self.parallel_num:
            problems.append(
                f"parallel_num is {self.parallel_num}, which does not divide {self.tokens} tokens"
            )
        return problems

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.resolution // self.down_size

    @property
    def tokens(self) -> int:
        """h*w, vision tokens of an image."""
        return self.grid**2

    @property
    def steps(self) -> int:
        """M, autoregressive steps of an image."""
        return self.tokens // self.parallel_num

    @property
    def patch_side(self) -> int:
        """p, side in tokens of the squares that the token order is made of; 1 is plain raster order."""
        return math.isqrt(self.parallel_num) if self.parallel_mode == "patch" else 1

    @property
    def sequence(self) -> int:
        """Positions of a training sequence: class tokens, queries, and all patches but the last."""
        return self.cls_token_num - 1 + self.tokens

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward part: 2/3 of 4 D, rounded up to a multiple of 256."""
        return 256 * math.ceil(int(2 * 4 * self.dim / 3) / 256)

    @property
    def head(self) -> HeadConfig:
        """The sizes of its diffusion head; ValueError where no head can be built from them."""
        return HeadConfig(
            ch_target=self.latent_dim,
            ch_cond=self.dim,
            ch_latent=self.diff_dim,
            depth_latent=self.diff_layers,
            depth_adanln=self.diff_adanln_layers,
            time_shift=self.time_shift,
            time_schedule=self.time_schedule,
            P_mean=self.P_mean,
            P_std=self.P_std,
            parallel_num=self.parallel_num,
            diff_batch_mul=self.diff_batch_mul,
            variant="class_conditional",
        )

    def to_json(self) -> dict[str, Any]:
        """All fields by name, as `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClassConditionalConfig:
        """Read what `to_json` wrote. Raises ValueError on unknown keys."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"class-conditional config: unknown keys {unknown}; expected {sorted(known)}")
        return cls(**dict(values))


_B = ClassConditionalConfig()
_L = ClassConditionalConfig(dim=1024, n_layer=32, n_head=16, diff_layers=8, diff_dim=1024, perturb_rate=0.05)
_H = ClassConditionalConfig(
    dim=1280, n_layer=40, n_head=20, diff_layers=12, diff_dim=1280, diff_adanln_layers=3, perturb_rate=0.05
)


def _with_parallel(config: ClassConditionalConfig, parallel_num: int) -> ClassConditionalConfig:
    return ClassConditionalConfig.from_json({**config.to_json(), "parallel_num": parallel_num})


CLASS_CONDITIONAL_PRESETS: dict[str, ClassConditionalConfig] = {
    f"{name}-{p}x": _with_parallel(config, p)
    for name, config in (("B", _B), ("L", _L), ("H", _H))
    for p in (1, 4, 16)
}
"""ImageNet 256 px, 16 pixels and 32 bits per token: B, L, H at 1, 4 and 16 tokens per step."""

PUBLISHED_GUIDANCE: dict[str, float] = {"B-1x": 3.2, "B-4x": 3.9, "B-16x": 6.1, "L-1x": 4.0, "H-1x": 4.55}
"""Scale of the published FIDs, with the linear schedule and 100 sampling steps."""
