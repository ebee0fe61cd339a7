"""A tokenizer's files, `ae_config.json` and `ae.safetensors`, and the fingerprint that latents carry.

Source: names and shapes are those of the weights published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.tensor_files.json_files import read_json_object
from models.tensor_files.safetensors_files import Place, SafetensorsWriter, read_specs, read_tensors
from models.tensor_files.strict import Rule, TensorSpec, check_tensors, explain_by, specs_in, specs_of
from models.tokenizer.config import TokenizerConfig
from models.tokenizer.network import BinaryTokenizer

CONFIG_FILE = "ae_config.json"
WEIGHTS_FILE = "ae.safetensors"
PREFIXES = ("encoder.", "decoder.")

RULES = (
    Rule(r"encoder\.conv_in\..*", CONFIG_FILE, ("ch", "in_channels")),
    Rule(r"decoder\.conv_in\..*", CONFIG_FILE, ("ch", "ch_mult", "z_channels", "gan_decoder")),
    Rule(r"encoder\.conv_out\..*", CONFIG_FILE, ("z_channels", "ch", "ch_mult")),
    Rule(r"decoder\.conv_out\..*", CONFIG_FILE, ("out_ch", "ch")),
    Rule(r"decoder\.adaptive\..*", CONFIG_FILE, ("ch", "ch_mult", "z_channels")),
    Rule(r".*", CONFIG_FILE, ("ch", "ch_mult", "num_res_blocks")),
)


@dataclass(frozen=True)
class TokenizerWeights:
    """A binary tokenizer, checked; tensors of a file stay on disk (mapped) until they are read."""

    config: TokenizerConfig
    tensors: Mapping[str, Tensor]


def read_tokenizer_config(folder: str | Path) -> TokenizerConfig:
    """The configuration in `folder`; ValueError where it is absent, no JSON, or describes no tokenizer."""
    return _read_config(Path(folder) / CONFIG_FILE)


def _read_config(path: Path) -> TokenizerConfig:
    data = read_json_object(path, "that of a tokenizer or a published model")
    try:
        return TokenizerConfig.from_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_tokenizer_specs(found: Mapping[str, TensorSpec], config: TokenizerConfig, where: str) -> None:
    """Raise ValueError, with every misfit, unless `found` are exactly the tensors of `config`'s tokenizer.

    Names and shapes [...] are compared; the dtypes may be any.
    """
    data = config.to_json()
    values = {CONFIG_FILE: {**data["ddconfig"], "gan_decoder": data["gan_decoder"]}}
    check_tensors(found, specs_of(lambda: BinaryTokenizer(config)), where, explain_by(RULES, values))


def open_tokenizer(folder: str | Path) -> TokenizerWeights:
    """The tokenizer in `folder`, checked by the header of its file.

    Raises ValueError where a file is absent or broken, or the weights do not fit the configuration, listing
    every tensor that is missing, unexpected or misshapen.
    """
    return open_tokenizer_file(Path(folder) / WEIGHTS_FILE)


def config_beside(path: Path) -> Path:
    """Where the configuration of `NAME.safetensors` is published: `NAME_config.json`."""
    return path.with_name(f"{path.stem}_config.json")


def open_tokenizer_file(path: Path) -> TokenizerWeights:
    """The tokenizer in a file of any name, as `ae_d16c32.safetensors`; ValueError as `open_tokenizer`."""
    config, specs = _read_config(config_beside(path)), read_specs(path)
    check_tokenizer_specs(specs, config, str(path.parent))
    places = {name: Place(path.name, name) for name in specs}
    return TokenizerWeights(config, dict(read_tensors(path.parent, places)))


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> BinaryTokenizer:
    """`open_tokenizer`, built: float32, in eval mode, without gradients."""
    return _build(open_tokenizer(folder), device)


def tokenizer_from_state(
    config: TokenizerConfig, state: Mapping[str, Tensor], device: str | torch.device = "cpu"
) -> BinaryTokenizer:
    """The tokenizer of `config` on the tensors of `state`, as `load_tokenizer` builds it.

    state: tensors [...] by their published names, in any float dtype, copied to float32.
    Entries outside `encoder.` and `decoder.` (discriminator, losses, averages of a training file) are passed
    over. Raises ValueError listing every tensor that is missing, unexpected or misshapen.
    """
    tensors = {name: value for name, value in state.items() if name.startswith(PREFIXES)}
    check_tokenizer_specs(specs_in(tensors), config, "tokenizer")
    return _build(TokenizerWeights(config, tensors), device)


def _build(weights: TokenizerWeights, device: str | torch.device) -> BinaryTokenizer:
    with torch.device("meta"):
        tokenizer = BinaryTokenizer(weights.config)
    # Copies: a tensor may be a view of a file that is mapped, or of a model that goes on training.
    state = {
        name: torch.empty(value.shape, dtype=torch.float32, device=device).copy_(value)
        for name, value in weights.tensors.items()
    }
    tokenizer.load_state_dict(state, assign=True)
    return tokenizer.requires_grad_(False).eval()


def write_tokenizer(weights: TokenizerWeights, folder: str | Path) -> None:
    """Write config and weights, in the dtypes that these have, into `folder`, made where it is missing.

    OSError where a file cannot be written.
    """
    folder, specs = Path(folder), specs_in(weights.tensors)
    writer = SafetensorsWriter(folder, specs, {name: Place(WEIGHTS_FILE, name) for name in specs})
    for name, tensor in weights.tensors.items():
        writer.add(name, tensor, stays=True)
    writer.finish()
    text = json.dumps(weights.config.to_json(), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def save_tokenizer(tokenizer: BinaryTokenizer, folder: str | Path) -> None:
    """`write_tokenizer` of a tokenizer in memory; OSError as there."""
    write_tokenizer(TokenizerWeights(tokenizer.config, tokenizer.state_dict()), folder)


def tokenizer_fingerprint(source: str | Path | BinaryTokenizer) -> str:
    """SHA-256 (hex) of configuration and weights, of a folder or of a tokenizer in memory: equal for the two.

    Weights are hashed as float32, so the storage type does not matter where it is exact.
    """
    if isinstance(source, BinaryTokenizer):
        weights = TokenizerWeights(source.config, source.state_dict())
    else:
        weights = open_tokenizer(source)
    digest = hashlib.sha256(json.dumps(weights.config.to_json(), sort_keys=True).encode())
    for name, value in sorted(weights.tensors.items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
