"""The sizes of a binary tokenizer: the dictionary of `ae_config.json`, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from models.checks import LARGEST_DEPTH, LARGEST_WIDTH, is_count, wrong_counts

NORM_GROUPS = 32  # every GroupNorm of the network splits its channels in 32 groups


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of encoder and decoder, under the names of the published `ae_config.json`.

    `ch * ch_mult[i]` is the width of level i (level 0 works at full resolution, each further level at half of
    the one before), so the network shrinks each side by `2 ** (len(ch_mult) - 1)`. `z_channels` is the number
    of bits per token. Raises ValueError, naming every field that no network can be built from.
    """

    ch: int
    ch_mult: tuple[int, ...]
    z_channels: int
    num_res_blocks: int
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = False
    gan_decoder: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.ch_mult, list):  # as JSON has it
            object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        problems = [
            *wrong_counts(self, ("ch", "z_channels", "in_channels", "out_ch"), LARGEST_WIDTH),
            *wrong_counts(self, ("num_res_blocks",), LARGEST_DEPTH),
        ]
        factors = self.ch_mult if isinstance(self.ch_mult, tuple) else ()
        if not factors or not all(is_count(factor, LARGEST_DEPTH) for factor in factors):
            found = list(self.ch_mult) if isinstance(self.ch_mult, tuple) else self.ch_mult
            problems.append(f"ch_mult = {found!r}, expected one positive integer per level")
        elif is_count(self.ch) and any(width % NORM_GROUPS for width in self.widths):
            problems.append(
                f"ch = {self.ch} times ch_mult = {list(self.ch_mult)} gives the widths {list(self.widths)}, "
                f"expected multiples of {NORM_GROUPS} (the groups of each GroupNorm)"
            )
        if self.double_z is not False:
            problems.append(
                f"double_z = {self.double_z!r}, expected false: a binary tokenizer has no variance channels"
            )
        if not isinstance(self.gan_decoder, bool):
            problems.append(f"gan_decoder = {self.gan_decoder!r}, expected true or false")
        if problems:
            raise ValueError("tokenizer configuration: " + "; ".join(problems))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.ch * factor for factor in self.ch_mult)

    @property
    def downsample(self) -> int:
        """Pixels along the side of a token: every level but the last halves the picture."""
        return int(2 ** (len(self.ch_mult) - 1))

    def to_json(self) -> dict[str, Any]:
        """The dictionary of `ae_config.json`."""
        ddconfig = asdict(self) | {"ch_mult": list(self.ch_mult)}
        return {"gan_decoder": ddconfig.pop("gan_decoder"), "ddconfig": ddconfig}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenizerConfig:
        """Read the dictionary of `ae_config.json`.

        `ddconfig` defines the network, so a key of it that is missing or unknown raises ValueError, but for
        `resolution`, which the published code takes and makes nothing of. Other keys beside `ddconfig` and
        `gan_decoder` (absent = false) describe the training and are passed over.
        """
        ddconfig = data.get("ddconfig")
        if not isinstance(ddconfig, dict):
            raise ValueError(f"no `ddconfig` table, found the keys {sorted(data)}")
        ddconfig = {key: value for key, value in ddconfig.items() if key != "resolution"}
        known = {"ch", "ch_mult", "z_channels", "num_res_blocks", "in_channels", "out_ch", "double_z"}
        required = {"ch", "ch_mult", "z_channels", "num_res_blocks"}
        problems = [f"`{key}` is missing" for key in sorted(required - set(ddconfig))]
        problems += [f"`{key}` is unknown" for key in sorted(set(ddconfig) - known)]
        if problems:
            raise ValueError(f"ddconfig: {', '.join(problems)}")
        return cls(**ddconfig, gan_decoder=data.get("gan_decoder", False))


@dataclass(frozen=True)
class TokenizerPreset:
    """What is known of a published tokenizer without its files.

    `ch_mult` is None where only the number of levels is published; the factors then stand in the
    `ae_config.json` that ships with the weights.
    """

    z_channels: int
    levels: int
    ch_mult: tuple[int, ...] | None
    ch: int = 256
    num_res_blocks: int = 4

    def config(self, ch_mult: tuple[int, ...] | None = None, gan_decoder: bool = False) -> TokenizerConfig:
        """The full configuration; `ch_mult` must be given where it is not published, and may not differ
        elsewhere.

        Raises ValueError where `ch_mult` is missing, contradicts the published one, or has another number of
        levels.
        """
        factors = self.ch_mult if ch_mult is None else tuple(ch_mult)
        if factors is None:
            raise ValueError(
                f"this tokenizer has {self.levels} levels, whose width factors are published only in the "
                "`ae_config.json` beside its weights: read it with TokenizerConfig.from_json, or pass ch_mult"
            )
        if len(factors) != self.levels or (self.ch_mult is not None and factors != self.ch_mult):
            expected = list(self.ch_mult) if self.ch_mult else f"{self.levels} factors"
            raise ValueError(f"ch_mult = {list(factors)}, expected {expected} for this tokenizer")
        return TokenizerConfig(
            ch=self.ch,
            ch_mult=factors,
            z_channels=self.z_channels,
            num_res_blocks=self.num_res_blocks,
            gan_decoder=gan_decoder,
        )


TOKENIZER_PRESETS: dict[str, TokenizerPreset] = {
    "ae_d16c32": TokenizerPreset(z_channels=32, levels=5, ch_mult=(1, 1, 2, 2, 4)),
    "ae_d32c128": TokenizerPreset(z_channels=128, levels=6, ch_mult=None),
    "ae_d32c256": TokenizerPreset(z_channels=256, levels=6, ch_mult=None),
}
