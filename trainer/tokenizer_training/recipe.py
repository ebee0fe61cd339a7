"""The recipe of `bitdance tokenizer train`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.ingest.recipe import InputSection, KeepSection
from data_pipeline.ingest.refusals import MAX_BAD_FRACTION
from data_pipeline.tokenize.recipe import ClassSection
from foundation.sections import Problem, Section, check

Decay = Annotated[float, Field(ge=0, lt=1)]
NORM_GROUPS = 32  # of every GroupNorm of the network, so all widths are multiples of it


class NetworkSection(Section):
    """Sizes of encoder and decoder.

    Attributes:
        ch: width that `ch_mult` multiplies.
        ch_mult: a factor per level; the first works on pixels, each further one at half of the resolution
        before, so
            a token covers `2 ** (levels - 1)` pixels a side.
        num_res_blocks: residual blocks per level.
        bits: per token.
    """

    ch: int = Field(gt=0, multiple_of=NORM_GROUPS)
    ch_mult: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    num_res_blocks: int = Field(gt=0)
    bits: int = Field(default=32, gt=0)

    @property
    def downsample(self) -> int:
        """Pixels along the side of a token."""
        return int(2 ** (len(self.ch_mult) - 1))


class LossSection(Section):
    """Weights of the losses, and the quantizer's grouping.

    The defaults are those of the tokenizers that this one descends from (Open-MAGVIT2, WeTok). Their
    perceptual and adversarial terms are not here.

    Attributes:
        reconstruction: of the difference of pixels in [-1, 1].
        distance: `l1`, its mean absolute value, or `l2`, its mean square.
        commitment: mean squared distance of the encoder's output from its signs.
        entropy: entropy per sample minus entropy of the codebook, per group.
        group_bits: bits of a quantization group; its 2**group_bits codes are enumerated.
    """

    reconstruction: float = Field(default=1.0, gt=0.0)
    distance: Literal["l1", "l2"] = "l1"
    commitment: float = Field(default=0.25, ge=0.0)
    entropy: float = Field(default=0.1, ge=0.0)
    group_bits: int = Field(default=8, gt=0, le=16)


class OptimizerSection(Section):
    """Adam, linear warm-up, cosine to `final_lr`.

    Attributes:
        lr: highest learning rate.
        final_lr: at the last step.
        warmup: steps.
        betas: of Adam.
        clip: greatest norm of the gradient.
        ema: decay of the averaged weights, which are then the ones that are exported; None exports the last
        ones.
    """

    lr: float = Field(default=1e-4, gt=0.0)
    final_lr: float = Field(default=0.0, ge=0.0)
    warmup: int = Field(default=0, ge=0)
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    clip: float = Field(default=1.0, gt=0.0)
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)


class PhaseSection(Section):
    """A run of steps on the same resolution classes.

    Attributes:
        steps: how many.
        resolutions: classes that its batches are taken from, in proportion to their pictures.
        batch_pixels: pixels of a batch; all of its pictures have the same size, so their number follows.
    """

    steps: int = Field(gt=0)
    resolutions: list[int] = Field(min_length=1)
    batch_pixels: int = Field(gt=0)


class TokenizerRecipe(Section):
    """From image shards to a binary tokenizer.

    Attributes:
        input: image shards.
        keep: the filter's output; None keeps every sample.
        output: folder of the tokenizer.
        classes: sizes that pictures are cut to; a picture takes the bucket nearest in aspect of every class.
        network: sizes of the network.
        losses: their weights.
        optimizer: Adam and its schedule.
        phases: what is trained on, one after the other.
        seed: of the initial weights and of the batches.
        precision: of the convolutions; `auto` takes bfloat16 where the processor has matrix units for it, and
        says so.
        device: `cpu` or `cuda`.
        checkpoint_every: steps between checkpoints.
        memory_gigabytes: cap on the pictures, which are all held in memory, 3 bytes a pixel.
        max_pixels: cap on a picture's width times height, checked before decoding.
        max_bad_fraction: share of refused samples above which nothing is trained.
    """

    input: InputSection
    keep: KeepSection | None = None
    output: str
    classes: list[ClassSection] = Field(min_length=1)
    network: NetworkSection
    losses: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    phases: list[PhaseSection] = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: int = Field(default=100, gt=0)
    memory_gigabytes: float = Field(default=2.0, gt=0.0)
    max_pixels: int = Field(default=100_000_000, gt=0)
    max_bad_fraction: float = Field(default=MAX_BAD_FRACTION, ge=0.0, le=1.0)

    @property
    def steps(self) -> int:
        """All steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @check
    def _classes_rise(self) -> Iterator[Problem]:
        sides = [section.resolution for section in self.classes]
        if sides != sorted(set(sides)):
            yield "classes", f"must be distinct and in rising resolution, found {sides}"

    @check
    def _buckets_are_of_whole_tokens(self) -> Iterator[Problem]:
        d = self.network.downsample
        for number, section in enumerate(self.classes):
            for place, (height, width) in enumerate(section.buckets):
                key = f"classes.{number}.buckets.{place}"
                if height % d or width % d:
                    yield key, f"the bucket {height}x{width} is no multiple of {d}, the size of a token"
                elif height * width == d * d:
                    yield key, f"the bucket {height}x{width} is a single token: the decoder needs two"

    @check
    def _bits_form_groups(self) -> Iterator[Problem]:
        if self.network.bits % self.losses.group_bits:
            yield (
                "losses.group_bits",
                f"group_bits = {self.losses.group_bits} does not divide network.bits = {self.network.bits}",
            )

    @check
    def _phases_name_classes(self) -> Iterator[Problem]:
        sides = [section.resolution for section in self.classes]
        for number, phase in enumerate(self.phases):
            if unknown := sorted(set(phase.resolutions) - set(sides)):
                yield f"phases.{number}.resolutions", f"names {unknown}, expected some of {sides}"
