"""The binary tokenizer's own ``.pt`` files (`ae_*.pt`), whose sizes are read off the weights themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from models.tokenizer import BinaryTokenizer, TokenizerConfig, read_tokenizer_config
from models.weights import layout
from models.weights.modules import specs_of
from models.weights.safetensors_files import Place, SafetensorsWriter, read_specs, read_tensors
from models.weights.strict import TensorSpec, check_tensors, explain_by
from models.weights.torch_files import tensors_of

PREFIXES = ("encoder.", "decoder.")
STATE_DICT = "state_dict"


@dataclass(frozen=True)
class TokenizerWeights:
    """A binary tokenizer, checked; its tensors stay on disk (mapped) until they are read."""

    config: TokenizerConfig
    tensors: Mapping[str, Tensor]


def tokenizer_from_file(content: Mapping[str, Any], where: str) -> TokenizerWeights:
    """The tokenizer in the dictionary of an `ae_*.pt`: its `state_dict`, where the rest is for training only.

    Raises:
        ValueError: no `state_dict`, or its `encoder.` and `decoder.` entries are not exactly one tokenizer.
    """
    state = content.get(STATE_DICT)
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: no `{STATE_DICT}` in it; found {sorted(map(str, content))}")
    return tokenizer_from_state(state, f"{where}, {STATE_DICT}")


def tokenizer_from_state(state: Mapping[str, Any], where: str) -> TokenizerWeights:
    """The tokenizer in ``state``: its `encoder.` and `decoder.` entries. Raises ValueError as above."""
    tensors = tensors_of({k: v for k, v in state.items() if str(k).startswith(PREFIXES)}, where)
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    config = infer_tokenizer_config(specs, where)
    check_tokenizer_specs(specs, config, where)
    return TokenizerWeights(config, tensors)


def tokenizer_from_folder(folder: Path) -> TokenizerWeights:
    """The tokenizer in a folder with `ae_config.json` and `ae.safetensors`. Raises ValueError as above."""
    config, specs = read_tokenizer_config(folder), read_specs(folder / layout.TOKENIZER_WEIGHTS)
    check_tokenizer_specs(specs, config, str(folder))
    places = {name: Place(layout.TOKENIZER_WEIGHTS, name) for name in specs}
    return TokenizerWeights(config, dict(read_tensors(folder, places)))


def write_tokenizer_folder(weights: TokenizerWeights, folder: Path) -> None:
    """Write `ae_config.json` and `ae.safetensors`, in the dtypes that the tensors have."""
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in weights.tensors.items()}
    writer = SafetensorsWriter(folder, specs, {n: Place(layout.TOKENIZER_WEIGHTS, n) for n in specs})
    for name, tensor in weights.tensors.items():
        writer.add(name, tensor)
    writer.finish()
    text = json.dumps(weights.config.to_json(), indent=2) + "\n"
    (folder / layout.TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def write_tokenizer_file(weights: TokenizerWeights, file: IO[bytes]) -> None:
    """Write the published form, a ``.pt`` with the tensors under `state_dict`."""
    torch.save({STATE_DICT: dict(weights.tensors)}, file)


def check_tokenizer_specs(found: Mapping[str, TensorSpec], config: TokenizerConfig, where: str) -> None:
    """Raise ValueError unless ``found`` are exactly the tensors of the binary tokenizer of ``config``."""
    data = config.to_json()
    values = {layout.TOKENIZER_CONFIG: {**data["ddconfig"], "gan_decoder": data["gan_decoder"]}}
    explain = explain_by(layout.TOKENIZER_RULES, values)
    check_tensors(found, specs_of(lambda: BinaryTokenizer(config)), where, explain)


def infer_tokenizer_config(specs: Mapping[str, TensorSpec], where: str) -> TokenizerConfig:
    """The sizes of the tokenizer whose tensors these are: each is the shape or the number of some tensor.

    The caller checks all tensors against the result, so a file that contradicts itself is found there.

    Raises:
        ValueError: a tensor that tells a size is absent, or the sizes make no tokenizer.
    """
    levels = count_numbered(specs, r"encoder\.down\.(\d+)\..*")
    telling = [
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
    ]
    telling += [f"encoder.down.{level}.block.0.conv1.weight" for level in range(max(levels, 1))]
    require_telling(specs, dict.fromkeys(telling, 4), where, "a binary tokenizer")
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


def require_telling(specs: Mapping[str, TensorSpec], sides: Mapping[str, int], where: str, what: str) -> None:
    """Raise ValueError unless each tensor named in ``sides`` is there, not empty, with so many dimensions."""
    absent = [
        name
        for name, count in sides.items()
        if name not in specs or len(specs[name].shape) != count or 0 in specs[name].shape
    ]
    if absent:
        raise ValueError(f"{where}: not the weights of {what}; {', '.join(absent)} missing or misshapen")


def count_numbered(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the group of ``pattern`` has among the names."""
    found = (re.fullmatch(pattern, name) for name in names)
    return len({match[1] for match in found if match})
