"""The part of a training recipe that says how steps are made of samples."""

from __future__ import annotations

from pydantic import Field, PositiveInt, field_validator

from foundation.recipes import Section

_LARGEST_RATIO = 10_000  # sum of the weights: the period of the classes' pattern, which is tabulated


class BatchRecipe(Section):
    """How steps are made of samples."""

    global_batch_size: PositiveInt = Field(description="Samples of a step, over all ranks")
    ratio: dict[int, int] = Field(
        description="Resolution class (pixels) -> whole weight, e.g. {256: 2, 512: 7, 1024: 1}"
    )
    max_tokens: PositiveInt = Field(
        description="Longest packed sequence: what a rank holds in memory at a time"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the order and of all draws")
    window: PositiveInt = Field(64, description="Shards whose samples are mixed with one another")
    image_to_caption: float = Field(
        0.0, ge=0, le=1, description="Share of samples trained picture -> caption"
    )
    text_drop: float = Field(0.1, ge=0, le=1, description="Share of captions dropped, for guidance")
    bit_flip: float = Field(
        0.1, ge=0, le=1, description="p_max: an input bit flips with probability p_max * u, u ~ U(0,1)"
    )

    @field_validator("ratio")
    @classmethod
    def _ratio_can_be_kept(cls, ratio: dict[int, int]) -> dict[int, int]:
        if min(ratio.values(), default=0) < 0 or not 0 < sum(ratio.values()) <= _LARGEST_RATIO:
            raise ValueError(
                f"give whole weights, like {{512: 1, 1024: 1}}, none negative, sum 1 to {_LARGEST_RATIO}"
            )
        return ratio
