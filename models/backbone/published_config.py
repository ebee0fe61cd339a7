"""`config.json` of a language model, read strictly: what this package computes with, and what it hands on.

Files come from strangers, and from transformers 4 and 5, which write the base of the rotary positions in two
forms. transformers takes what it finds, and many a wrong value would show only in the pictures.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from transformers import Qwen3Config

from models.tensor_files.json_files import read_json_object

# Far beyond any model, and small enough for the shapes of a senseless file to be computed and compared.
Size = Annotated[int, Field(gt=0, le=2**20)]
Layers = Annotated[int, Field(gt=0, le=2**10)]
Context = Annotated[int, Field(gt=0, le=2**30)]
TokenId = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    """Numbers are numbers: no text, no booleans, no infinity."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Rope(_Strict):
    """transformers 5's `rope_parameters`, of which 4's `rope_scaling` (published: null) is a part."""

    rope_type: Literal["default"] = "default"
    rope_theta: PositiveFloat | None = None


class PublishedQwen3(_Strict):
    """What decides what the model computes, and from `bos_token_id` on what others look for in its export."""

    model_type: Literal["qwen3"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[Size, Field(multiple_of=2)]
    max_position_embeddings: Context
    rms_norm_eps: PositiveFloat
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: PositiveFloat | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    use_sliding_window: Literal[False] = False
    layer_types: list[Literal["full_attention"]] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None
    attention_dropout: Share = 0.0
    initializer_range: PositiveFloat = 0.02
    max_window_layers: Annotated[int, Field(ge=0, le=2**10)] = 28


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def _rope_bases(values: Mapping[str, Any]) -> set[float]:
    """What the forms say of the base of the rotary positions: one value, where they agree."""
    nested = [(values.get(name) or {}).get("rope_theta") for name in ROPE[1:]]
    return {base for base in (values.get("rope_theta"), *nested) if base is not None}


def _contradictions(values: Mapping[str, Any], wrong: Set[str]) -> list[str]:
    """What no model can be built from, though each value alone is possible; `wrong` ones are left alone."""

    def usable(*names: str) -> bool:
        return not wrong & set(names)

    problems = []
    if usable("num_attention_heads", "num_key_value_heads"):
        heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
        if heads % shared:
            problems.append(
                f"num_attention_heads is {heads}; expected a multiple of num_key_value_heads = {shared}"
            )
    if usable("num_hidden_layers", "layer_types") and values.get("layer_types") is not None:
        layers, types = values["num_hidden_layers"], values["layer_types"]
        if len(types) != layers:
            problems.append(
                f"layer_types names {len(types)} layers; expected num_hidden_layers = {layers} of them, or "
                f"null, and the weights model.layers.0.* to model.layers.{layers - 1}.*: mend the one that "
                "is not so"
            )
    if usable(*ROPE) and len(bases := _rope_bases(values)) != 1:
        problems.append(
            f"rope_theta is {sorted(bases) or 'missing'}; expected one positive number, here or in "
            "rope_parameters"
        )
    for name in TOKEN_IDS:
        if usable(name, "vocab_size") and values.get(name) is not None:
            ids, rows = values[name], values["vocab_size"]
            if max(ids if isinstance(ids, list) else [ids], default=0) >= rows:
                problems.append(f"{name} is {reprlib.repr(ids)}; expected less than vocab_size = {rows}")
    return problems


def read_backbone_config(path: Path) -> Qwen3Config:
    """The language model that the `config.json` at ``path`` describes.

    Raises:
        ValueError: no such file, no JSON; or naming every value that is missing, wrong, or not what this
            package computes with (another kind of model, another activation, a sliding window, scaled rotary
            positions).
    """
    values = read_json_object(path, "that of a Qwen3 language model")
    wrong: dict[str, str] = {}
    try:
        read = PublishedQwen3.model_validate(values)
    except ValidationError as error:
        wrong = _wrong_values(error, values)
    problems = [*wrong.values(), *_contradictions(values, wrong.keys())]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{path}: no language model that text-to-image models are built on:\n{listed}")
    unlike_transformers = {"model_type", *ROPE}
    (rope_theta,) = _rope_bases(values)
    return Qwen3Config(**read.model_dump(exclude=unlike_transformers), rope_theta=rope_theta)


def _wrong_values(error: ValidationError, values: Mapping[str, Any]) -> dict[str, str]:
    """One line for each wrong field by its name, however many forms of it were tried."""
    expected: dict[str, list[str]] = {}
    for mistake in error.errors():
        words = mistake["msg"].removeprefix("Input should be ")
        expected.setdefault(str(mistake["loc"][0]), []).append(words)
    return {
        name: f"{name} is {reprlib.repr(values[name])}; expected {' or '.join(dict.fromkeys(words))}"
        if name in values
        else f"{name} is missing"
        for name, words in expected.items()
    }
