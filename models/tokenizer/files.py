"""A tokenizer's files, `ae_config.json` and `ae.safetensors`, and the fingerprint that latents carry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.tokenizer.config import TokenizerConfig
from models.tokenizer.network import BinaryTokenizer

CONFIG_FILE = "ae_config.json"
WEIGHTS_FILE = "ae.safetensors"
PREFIXES = ("encoder.", "decoder.")


def save_tokenizer(tokenizer: BinaryTokenizer, folder: str | Path) -> None:
    """Write config and weights into `folder`, which is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(tokenizer.config.to_json(), indent=2) + "\n")


def read_tokenizer_config(folder: str | Path) -> TokenizerConfig:
    """The configuration in `folder`; ValueError where it is absent, no JSON, or describes no tokenizer."""
    path = Path(folder) / CONFIG_FILE
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {CONFIG_FILE}: expected the folder of a tokenizer or a published model"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected an object")
    return TokenizerConfig.from_json(data)


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> BinaryTokenizer:
    """Read `ae_config.json` and `ae.safetensors`: float32, in eval mode, without gradients.

    Raises ValueError where a file is absent or the weights do not fit the configuration, listing every tensor
    that is missing, unexpected or misshapen.
    """
    config = read_tokenizer_config(folder)
    return tokenizer_from_state(config, dict(_stored_tensors(Path(folder))), device)


def tokenizer_from_state(
    config: TokenizerConfig, state: Mapping[str, Tensor], device: str | torch.device = "cpu"
) -> BinaryTokenizer:
    """Build the tokenizer of `config` on the tensors of `state`, widened to float32, in eval mode without
    gradients.

    Entries outside `encoder.` and `decoder.` (discriminator, losses, averages of a training file) are passed
    over. Raises ValueError listing every tensor that is missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        tokenizer = BinaryTokenizer(config)
    expected = {name: list(value.shape) for name, value in tokenizer.state_dict().items()}
    found = {name: value for name, value in state.items() if name.startswith(PREFIXES)}
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"unexpected {name} {list(found[name].shape)}" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {list(found[name].shape)}, expected {expected[name]}"
        for name in expected
        if name in found and list(found[name].shape) != expected[name]
    ]
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(
            "tokenizer weights do not fit ae_config.json "
            f"(ch {config.ch}, ch_mult {list(config.ch_mult)}, num_res_blocks {config.num_res_blocks}, "
            f"z_channels {config.z_channels}, gan_decoder {config.gan_decoder}), which decides shapes:\n  "
            + "\n  ".join(shown)
        )
    widened = {name: value.to(device=device, dtype=torch.float32) for name, value in found.items()}
    tokenizer.load_state_dict(widened, assign=True)
    return tokenizer.requires_grad_(False).eval()


def tokenizer_fingerprint(source: str | Path | BinaryTokenizer) -> str:
    """SHA-256 (hex) of configuration and weights, of a folder or of a tokenizer in memory: equal for the two.

    Weights are hashed as float32, so the storage type does not matter where it is exact.
    """
    if isinstance(source, BinaryTokenizer):
        config, tensors = source.config, iter(sorted(source.state_dict().items()))
    else:
        config, tensors = read_tokenizer_config(source), _stored_tensors(Path(source))
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    for name, value in tensors:
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `ae.safetensors`, one at a time, sorted by name."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS_FILE}, the tokenizer's weights")
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}): copy it anew") from error
