"""The part of a training recipe that says how steps are made of samples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, field_validator

from foundation.sections import Section

_LARGEST_RATIO = 10_000  # sum of the weights: the period of the classes' pattern, which is tabulated

Share = Annotated[float, Field(ge=0, le=1)]


class BatchRecipe(Section):
    """How steps are made of samples.

    Attributes:
        global_batch_size: samples of a step, over all ranks.
        ratio: resolution class in pixels -> whole weight, such as {256: 2, 512: 7, 1024: 1}.
        max_tokens: of a packed sequence: what a rank holds in memory at a time.
        seed: of the order and of all draws.
        window: shards whose samples are mixed with one another.
        image_to_caption: share of the samples that are trained picture -> caption.
        text_drop: share of the captions that are dropped, for guidance.
        bit_flip: p_max; a bit of the input flips with probability p_max * u, u ~ U(0, 1).
    """

    global_batch_size: PositiveInt
    ratio: dict[int, int]
    max_tokens: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    window: PositiveInt = 64
    image_to_caption: Share = 0.0
    text_drop: Share = 0.1
    bit_flip: Share = 0.1

    @field_validator("ratio")
    @classmethod
    def _ratio_can_be_kept(cls, ratio: dict[int, int]) -> dict[int, int]:
        if min(ratio.values(), default=0) < 0 or not 0 < sum(ratio.values()) <= _LARGEST_RATIO:
            raise ValueError(
                f"give whole weights, like {{512: 1, 1024: 1}}, none negative, sum 1 to {_LARGEST_RATIO}"
            )
        return ratio
