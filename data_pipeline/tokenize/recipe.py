"""The recipe of `bitdance data tokenize`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data_pipeline.ingest.recipe import InputSection, KeepSection
from data_pipeline.ingest.refusals import MAX_BAD_FRACTION
from data_pipeline.records import MAX_TEXT_TOKENS
from foundation.sections import Problem, Section, check

Side = Annotated[int, Field(gt=0)]


class ClassSection(Section):
    """A resolution class: its nominal side and its buckets, `[height, width]` in pixels."""

    resolution: int = Field(gt=0)
    buckets: list[tuple[Side, Side]] = Field(min_length=1, max_length=256)


class TrainTextTokenizer(Section):
    """A byte-level BPE trained on the captions of the data; for small experiments."""

    vocab_size: int = Field(ge=270)


class TextTokenizerSection(Section):
    """The text tokenizer that captions are counted with: `name` (a folder or a hub name) or `train`."""

    name: str | None = None
    train: TrainTextTokenizer | None = None

    @check
    def _one_of_both(self) -> Iterator[Problem]:
        if (self.name is None) == (self.train is None):
            yield "", "needs either name (a folder or a hub name) or train"


class CaptionSection(Section):
    """What happens to captions.

    Attributes:
        max_tokens: longer ones are cut.
        missing: whether a picture without a caption is kept, with an empty one.
    """

    max_tokens: int = Field(default=512, gt=0, le=MAX_TEXT_TOKENS)
    missing: Literal["drop", "keep"] = "drop"


class PictureSection(Section):
    """Limits on pictures.

    Attributes:
        max_pixels: cap on width times height, checked before decoding.
        max_upscale: how far a picture may be enlarged to cover a bucket; one that would need more does not go
            into that class.
        max_cropped: share of a picture that may be cut away; one that would lose more does not go into that
            class.
        flips: each picture a second time, mirrored left to right, with `-flip` behind its key.
    """

    max_pixels: int = Field(default=100_000_000, gt=0)
    max_upscale: float = Field(default=1.0, gt=0.0)
    max_cropped: float = Field(default=0.5, ge=0.0, le=1.0)
    flips: bool = False


class ComputeSection(Section):
    """How the work is done; what is written does not depend on it, up to rounding of another device.

    Attributes:
        device: `cpu` or `cuda`; process i takes GPU i modulo their number.
        processes: tasks under way at a time, each in a worker process with its own copy of the tokenizer; 0:
            one at a time in the job's own process, which starts sooner, and dies of what kills a worker.
        decoders: worker processes that decode and resize, for each of those; 0 decodes in the same process.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    processes: int = Field(default=1, ge=0)
    decoders: int = Field(default=0, ge=0)


class TokenizeRecipe(Section):
    """From image shards to a latent dataset.

    Attributes:
        input: image shards.
        keep: the filter's output; None keeps every sample.
        tokenizer: folder of the binary tokenizer.
        text_tokenizer: what caption lengths are counted with.
        output: folder of the dataset.
        classes: resolution classes.
        assign: a picture goes to `every` class that it is big enough for, or to the `largest` only.
        captions: limits on captions.
        pictures: limits on pictures.
        dtype: of the tokenizer's weights and activations.
        batch_pixels: pixels in an encoder batch; a batch holds pictures of one bucket, so its number of
            pictures follows from the bucket's area.
        shard_megabytes: size at which a new MDS shard is begun.
        max_bad_fraction: share of refused samples above which a task fails.
        near_duplicates: greatest Hamming distance of two 64-bit perceptual hashes that count as the same
            picture; None keeps all.
        compute: how the work is done.
    """

    input: InputSection
    keep: KeepSection | None = None
    tokenizer: str
    text_tokenizer: TextTokenizerSection
    output: str
    classes: list[ClassSection] = Field(min_length=1)
    assign: Literal["every", "largest"] = "largest"
    captions: CaptionSection = CaptionSection()
    pictures: PictureSection = PictureSection()
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_pixels: int = Field(default=4 << 20, gt=0)
    shard_megabytes: int = Field(default=64, gt=0, lt=4096)
    max_bad_fraction: float = Field(default=MAX_BAD_FRACTION, ge=0.0, le=1.0)
    near_duplicates: int | None = Field(default=3, ge=0, le=7)
    compute: ComputeSection = ComputeSection()

    @field_validator("classes")
    @classmethod
    def _classes_rise(cls, classes: list[ClassSection]) -> list[ClassSection]:
        sides = [c.resolution for c in classes]
        if sides != sorted(set(sides)):
            raise ValueError(f"must be distinct and in rising resolution, found {sides}")
        return classes
