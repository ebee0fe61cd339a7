"""What a diffusion head is made of: the fields of `vision_head_config.json`, checked."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from models.checks import LARGEST_DEPTH, LARGEST_PATCH, LARGEST_WIDTH, is_finite, wrong_counts

Variant = Literal["text_to_image", "class_conditional"]

# Width of an attention head. The two families of published weights differ here, and nothing in their
# files says so: a fused wqkv has the same shape whatever the number of heads.
ATTENTION_HEAD_WIDTH: dict[str, int] = {"text_to_image": 128, "class_conditional": 64}

# What a config file that leaves them out means. A new head has other values: those of the published models.
PUBLISHED_DEFAULTS = {"P_mean": 0.0, "P_std": 1.0, "use_swiglu": False}


@dataclass(frozen=True)
class HeadConfig:
    """Sizes and schedules of a `DiffusionHead`; raises ValueError on what cannot be built.

    Named as in the published `vision_head_config.json`; `variant` is not part of that file.
    """

    ch_target: int  # C, bits per token
    ch_cond: int  # D, width of the hidden states that condition the head
    ch_latent: int  # W, width of the head
    depth_latent: int  # residual blocks
    depth_adanln: int = 2  # adaLN projections, each shared by depth_latent / depth_adanln consecutive blocks
    time_shift: float = 1.0  # s of `shift(t)`; 1 leaves time alone
    time_schedule: Literal["logit_normal", "uniform"] = "logit_normal"  # density of t in training
    P_mean: float = -0.8  # logit_normal: mean of logit(t)
    P_std: float = 0.8  # logit_normal: standard deviation of logit(t)
    parallel_num: int = 16  # P, tokens denoised together
    diff_batch_mul: int = 1  # draws of (t, noise) per target in training
    use_swiglu: bool = True  # False (text-to-image only): Linear, SiLU, Linear as the feed-forward
    variant: Variant = "text_to_image"

    def __post_init__(self) -> None:
        problems = [*self._bad_numbers(), *self._bad_combinations()]
        if problems:
            raise ValueError("this head cannot be built:\n" + "\n".join(f"- {p}" for p in problems))

    def _bad_numbers(self) -> list[str]:
        problems = [
            *wrong_counts(self, ("ch_target", "ch_cond", "ch_latent"), LARGEST_WIDTH),
            *wrong_counts(self, ("depth_latent", "depth_adanln", "diff_batch_mul"), LARGEST_DEPTH),
            *wrong_counts(self, ("parallel_num",), LARGEST_PATCH),
        ]
        for name in ("time_shift", "P_std"):
            value = getattr(self, name)
            if not (is_finite(value) and value > 0):
                problems.append(f"{name} is {reprlib.repr(value)}; expected a positive number")
        if not is_finite(self.P_mean):
            problems.append(f"P_mean is {reprlib.repr(self.P_mean)}; expected a finite number")
        if not isinstance(self.use_swiglu, bool):
            problems.append(f"use_swiglu is {self.use_swiglu!r}; expected true or false")
        if self.time_schedule not in ("logit_normal", "uniform"):
            problems.append(f"time_schedule is {self.time_schedule!r}; expected 'logit_normal' or 'uniform'")
        if self.variant not in ATTENTION_HEAD_WIDTH:
            problems.append(f"variant is {self.variant!r}; expected one of {sorted(ATTENTION_HEAD_WIDTH)}")
        return problems

    def _bad_combinations(self) -> list[str]:
        if self._bad_numbers():
            return []
        problems = []
        if self.depth_latent % self.depth_adanln:
            problems.append(
                f"depth_latent is {self.depth_latent}, which depth_adanln = {self.depth_adanln} does not "
                "divide; each adaLN projection serves the same number of consecutive blocks"
            )
        if not self.single_token and self.ch_latent % self.attention_head_width:
            problems.append(
                f"ch_latent is {self.ch_latent}; a {self.variant} head needs a multiple of its attention "
                f"head width, {self.attention_head_width}"
            )
        if self.variant == "class_conditional" and not self.use_swiglu:
            problems.append("use_swiglu is false, which only text_to_image heads know; set it to true")
        return problems

    @property
    def single_token(self) -> bool:
        """True for the MLP that denoises one token (class-conditional, P = 1), False for the DiT."""
        return self.variant == "class_conditional" and self.parallel_num == 1

    @property
    def attention_head_width(self) -> int:
        """Width of an attention head: 128 for text-to-image, 64 for class-conditional heads."""
        return ATTENTION_HEAD_WIDTH[self.variant]

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward part: int(1.5 W)."""
        return int(1.5 * self.ch_latent)

    def to_json(self) -> dict[str, Any]:
        """The dict of a published `vision_head_config.json`."""
        values = asdict(self)
        del values["variant"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], variant: Variant = "text_to_image") -> HeadConfig:
        """Read the dict of a `vision_head_config.json`. Raises ValueError on missing or unknown keys.

        What the published code assumes where a key is absent is assumed here (`PUBLISHED_DEFAULTS`), and
        `grad_checkpointing`, which is no part of the model, is passed over.
        """
        values = {key: value for key, value in values.items() if key != "grad_checkpointing"}
        known = {f.name for f in fields(cls)} - {"variant"}
        required = {"ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln", "parallel_num"}
        missing, unknown = sorted(required - values.keys()), sorted(values.keys() - known)
        if missing or unknown:
            raise ValueError(
                f"head config: missing keys {missing or 'none'}, unknown keys {unknown or 'none'}; "
                f"expected {sorted(known)}"
            )
        return cls(**(PUBLISHED_DEFAULTS | values), variant=variant)
