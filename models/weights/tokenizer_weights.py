"""The binary tokenizer's own ``.pt`` files (`ae_*.pt`), whose sizes are read off the weights themselves.

Source: names and shapes are those of the weights published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import IO, Any

import torch

from models.tensor_files.strict import TensorSpec, specs_in
from models.tokenizer import TokenizerConfig
from models.tokenizer.files import PREFIXES, TokenizerWeights, check_tokenizer_specs
from models.weights.torch_files import STATE_DICT, tensors_of


def tokenizer_from_file(content: Mapping[str, Any], where: str) -> TokenizerWeights:
    """The tokenizer in the dictionary of an `ae_*.pt`: its `state_dict`, where the rest is for training only.

    Raises:
        ValueError: no `state_dict`, or its `encoder.` and `decoder.` entries are not exactly one tokenizer.
    """
    state = content.get(STATE_DICT)
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: no `{STATE_DICT}` in it; found {sorted(map(str, content))}")
    return infer_tokenizer(state, f"{where}, {STATE_DICT}")


def infer_tokenizer(state: Mapping[str, Any], where: str) -> TokenizerWeights:
    """The tokenizer in ``state``: its `encoder.` and `decoder.` entries. Raises ValueError as above."""
    tensors = tensors_of({k: v for k, v in state.items() if str(k).startswith(PREFIXES)}, where)
    specs = specs_in(tensors)
    config = infer_tokenizer_config(specs, where)
    check_tokenizer_specs(specs, config, where)
    return TokenizerWeights(config, tensors)


def write_tokenizer_file(weights: TokenizerWeights, file: IO[bytes]) -> None:
    """Write the published form, a ``.pt`` with the tensors under `state_dict`."""
    torch.save({STATE_DICT: dict(weights.tensors)}, file)


def infer_tokenizer_config(specs: Mapping[str, TensorSpec], where: str) -> TokenizerConfig:
    """The sizes of the tokenizer whose tensors these are: each is the shape or the number of some tensor.

    specs: shape [...] and dtype of each tensor, by its published name; dtypes are not looked at.

    The caller checks all tensors against the result, so a file that contradicts itself is found there.

    Raises:
        ValueError: a tensor that tells a size is absent, or the sizes make no tokenizer.
    """
    levels = count_numbered(specs, r"encoder\.down\.(\d+)\..*")
    telling = {
        "encoder.conv_in.weight": ("ch", "in_channels", "3", "3"),
        "encoder.conv_out.weight": ("z_channels", "width of the last level", "1", "1"),
        "decoder.conv_in.weight": (
            "width of the last level",
            "z_channels, twice with a GAN decoder",
            "3",
            "3",
        ),
        "decoder.conv_out.weight": ("out_ch", "width of level 0", "3", "3"),
    }
    for level in range(max(levels, 1)):
        sides = (f"ch * ch_mult[{level}]", f"width of level {max(level - 1, 0)}", "3", "3")
        telling[f"encoder.down.{level}.block.0.conv1.weight"] = sides
    require_telling(specs, telling, where, "a binary tokenizer")
    shapes = [specs[name].shape for name in telling]
    (ch, in_channels), bits = shapes[0][:2], shapes[1][0]
    widths = [shape[0] for shape in shapes[4:]]
    if any(width % ch for width in widths):
        raise ValueError(f"{where}: levels of widths {widths}; expected multiples of ch = {ch}")
    try:
        return TokenizerConfig(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            z_channels=bits,
            num_res_blocks=count_numbered(specs, r"encoder\.down\.0\.block\.(\d+)\..*"),
            in_channels=in_channels,
            out_ch=shapes[3][0],
            gan_decoder=shapes[2][1] == 2 * bits,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def require_telling(
    specs: Mapping[str, TensorSpec], telling: Mapping[str, tuple[str, ...]], where: str, what: str
) -> None:
    """Raise ValueError unless each tensor of ``telling`` is there, not empty, with so many dimensions.

    telling: name -> what each side of its shape is, for the message.
    specs: shape [...] and dtype of each tensor; dtypes are not looked at.
    """
    problems = []
    for name, sides in telling.items():
        expected = f"expected [{', '.join(sides)}]"
        if name not in specs:
            problems.append(f"{name} is missing, {expected}")
        elif len(specs[name].shape) != len(sides) or 0 in specs[name].shape:
            problems.append(f"{name} is {list(specs[name].shape)}, {expected}")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{where}: not the weights of {what}, whose sizes these tensors tell:\n{listed}")


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of ``pattern`` has among the names."""
    found = (re.fullmatch(pattern, name) for name in names)
    return len({match[1] for match in found if match})
