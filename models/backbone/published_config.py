"""`config.json` of a language model, read strictly: what of it this package uses, and nothing else.

Files come from strangers, and from transformers 4 and 5, which write the base of the rotary positions in two
forms. transformers takes what it finds, and many a wrong value would show only in the pictures.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from transformers import Qwen3Config

from models.tensor_files.json_files import read_json_object

# Far beyond any model, and small enough for the shapes of a senseless file to be computed and compared.
Size = Annotated[int, Field(gt=0, le=2**20)]
Layers = Annotated[int, Field(gt=0, le=2**10)]


class _Strict(BaseModel):
    """Numbers are numbers: no text, no booleans, no infinity."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Rope(_Strict):
    """transformers 5's `rope_parameters`, of which 4's `rope_scaling` (published: null) is a part."""

    rope_type: Literal["default"] = "default"
    rope_theta: PositiveFloat | None = None


class PublishedQwen3(_Strict):
    """What decides what the model computes, and the token ids that others look for in its export."""

    model_type: Literal["qwen3"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[Size, Field(multiple_of=2)]
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: PositiveFloat | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def rope_bases(self) -> set[float]:
        """What the two forms say of the base of the rotary positions: one value, where they agree."""
        nested = [rope.rope_theta for rope in (self.rope_scaling, self.rope_parameters) if rope is not None]
        return {base for base in (self.rope_theta, *nested) if base is not None}

    def contradictions(self) -> list[str]:
        """What no model can be built from, though each value alone is possible."""
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads is {self.num_attention_heads}; expected a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            problems.append(
                f"layer_types names {len(self.layer_types)} layers; expected num_hidden_layers = "
                f"{self.num_hidden_layers} of them, or null"
            )
        if len(self.rope_bases) != 1:
            problems.append(
                f"rope_theta is {sorted(self.rope_bases) or 'missing'}; expected one positive number, "
                "here or in rope_parameters"
            )
        return problems


def read_backbone_config(path: Path) -> Qwen3Config:
    """The language model that the `config.json` at ``path`` describes.

    Raises:
        ValueError: no such file, no JSON; or naming every value that is missing, wrong, or not what this
            package computes with (another kind of model, another activation, a sliding window, scaled rotary
            positions).
    """
    values = read_json_object(path, "that of a Qwen3 language model")
    try:
        read = PublishedQwen3.model_validate(values)
        problems = read.contradictions()
    except ValidationError as error:
        problems = _wrong_values(error, values)
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{path}: no language model that text-to-image models are built on:\n{listed}")
    unlike_transformers = {"model_type", "rope_theta", "rope_scaling", "rope_parameters"}
    (rope_theta,) = read.rope_bases
    return Qwen3Config(**read.model_dump(exclude=unlike_transformers), rope_theta=rope_theta)


def _wrong_values(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """One line for each field, however many forms of it were tried."""
    expected: dict[str, list[str]] = {}
    for mistake in error.errors():
        words = mistake["msg"].removeprefix("Input should be ")
        expected.setdefault(str(mistake["loc"][0]), []).append(words)
    return [
        f"{name} is {reprlib.repr(values[name])}; expected {' or '.join(dict.fromkeys(words))}"
        if name in values
        else f"{name} is missing"
        for name, words in expected.items()
    ]
