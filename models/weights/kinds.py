"""Weights of any kind that this package knows: which kind, read from anywhere, written in either form.

Ours is always a folder of safetensors and JSON. The published form of a text-to-image model is the same
folder; that of a class-conditional model or of a binary tokenizer alone is a ``.pt``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import IO, TypeAlias

from torch import Tensor

from models.checks import WrongRequest
from models.tensor_files.json_files import read_json_object
from models.tensor_files.progress import Progress, silent
from models.tokenizer.files import CONFIG_FILE as TOKENIZER_CONFIG
from models.tokenizer.files import (
    TokenizerWeights,
    config_beside,
    open_tokenizer,
    open_tokenizer_file,
    write_tokenizer,
)
from models.weights import layout
from models.weights.class_conditional import (
    CONFIG as CLASS_CONDITIONAL_CONFIG,
)
from models.weights.class_conditional import (
    ClassConditionalWeights,
    class_conditional_from_file,
    class_conditional_from_folder,
    write_class_conditional_file,
    write_class_conditional_folder,
)
from models.weights.folder import write_source
from models.weights.source import ModelSource, open_folder
from models.weights.tokenizer_weights import tokenizer_from_file, write_tokenizer_file
from models.weights.torch_files import STATE_DICT, STATES, read_torch_file

Weights: TypeAlias = ModelSource | ClassConditionalWeights | TokenizerWeights


def open_weights(path: Path, heads: int | None = None) -> Weights:
    """Open a folder of safetensors, ours or published, or a published ``.pt``; check it, read no weights yet.

    A tokenizer may also be a published ``NAME.safetensors`` with ``NAME_config.json`` beside it.

    heads: attention heads of a class-conditional ``.pt``, where it does not tell and they are not 64 wide.

    Raises:
        ValueError: not weights of a known kind, or not whole, or not fitting their configuration.
        WrongRequest: ``heads`` is given for weights that are no class-conditional ``.pt``, or is not theirs.
    """
    if path.is_file():
        return _open_file(path, heads)
    if heads is not None:
        raise WrongRequest(f"{path}: a folder tells its number of heads; leave it out")
    if (path / layout.LLM_CONFIG).is_file():
        return open_folder(path)
    if (path / CLASS_CONDITIONAL_CONFIG).is_file():
        return class_conditional_from_folder(path)
    if (path / TOKENIZER_CONFIG).is_file():
        return open_tokenizer(path)
    hint = f"; there is an export inside: name {path / 'export'}" if (path / "export").is_dir() else ""
    raise ValueError(
        f"{path}: no weights here; expected {layout.LLM_CONFIG} (text-to-image), {CLASS_CONDITIONAL_CONFIG} "
        f"(class-conditional) or {TOKENIZER_CONFIG} (tokenizer) in the folder, or a .pt file{hint}"
    )


def _open_file(path: Path, heads: int | None) -> Weights:
    if path.suffix == ".safetensors":
        config = config_beside(path)
        if config.is_file() and "ddconfig" in read_json_object(config, "that of a tokenizer"):
            return open_tokenizer_file(path)
        raise ValueError(
            f"{path}: one file of a model; expected its folder, with the configuration (of a tokenizer, "
            f"{config.name} beside it will do)"
        )
    content = read_torch_file(path)
    if any(name in content for name in STATES):
        return class_conditional_from_file(content, str(path), heads)
    if heads is not None:
        raise WrongRequest(f"{path}: no class-conditional model, so it has no number of heads; leave it out")
    if STATE_DICT in content:
        return tokenizer_from_file(content, str(path))
    raise ValueError(
        f"{path}: holds {sorted(map(str, content))[:10]}; expected `ema` or `model` (a class-conditional "
        f"model), or `{STATE_DICT}` (a binary tokenizer)"
    )


def write_folder(weights: Weights, folder: Path, progress: Progress = silent) -> None:
    """Write ``weights`` in our form into ``folder``, which is made where it is missing.

    progress goes through the tensors of a model, and may show how far it is.
    """
    if isinstance(weights, ModelSource):
        write_source(weights, folder, progress=progress)
    elif isinstance(weights, ClassConditionalWeights):
        write_class_conditional_folder(weights, folder, progress)
    else:
        write_tokenizer(weights, folder)


def write_file(weights: ClassConditionalWeights | TokenizerWeights, file: IO[bytes]) -> None:
    """Write ``weights`` in their published form, a ``.pt``."""
    if isinstance(weights, ClassConditionalWeights):
        write_class_conditional_file(weights, file)
    else:
        write_tokenizer_file(weights, file)


def bytes_of(weights: ClassConditionalWeights | TokenizerWeights) -> int:
    """What their tensors take in the published file."""
    parts: list[Tensor] = [*weights.tensors.values()]
    if isinstance(weights, ClassConditionalWeights) and weights.tokenizer is not None:
        parts += weights.tokenizer.tensors.values()
    return sum(tensor.nbytes for tensor in parts)


def with_frozen_tokenizer(
    weights: ClassConditionalWeights | TokenizerWeights, folder: Path | None
) -> ClassConditionalWeights | TokenizerWeights:
    """What a published ``.pt`` holds: a class-conditional model with its tokenizer, or a tokenizer.

    Raises:
        ValueError: the model has no tokenizer and none is named (the published sampler loads both, strictly),
            the one in ``folder`` has other bits, or a tokenizer is to be given a tokenizer.
    """
    if isinstance(weights, TokenizerWeights):
        if folder is not None:
            raise ValueError(f"{folder}: the weights are a tokenizer themselves; leave the option out")
        return weights
    if folder is None:
        if weights.tokenizer is None:
            raise ValueError(
                "the model came without its binary tokenizer, which a published file has under `vae.`; name "
                "the tokenizer's folder"
            )
        return weights
    tokenizer = open_tokenizer(folder)
    if tokenizer.config.z_channels != weights.config.latent_dim:
        raise ValueError(
            f"{folder}: a tokenizer of {tokenizer.config.z_channels} bits a token, but the model has "
            f"latent_dim = {weights.config.latent_dim}: it was trained with another tokenizer"
        )
    return dataclasses.replace(weights, tokenizer=tokenizer)


def describe(weights: Weights) -> str:
    """One line about what they are, for a person."""
    if isinstance(weights, ModelSource):
        config = weights.config
        count = sum(spec.numel for spec in weights.specs.values())
        return (
            f"text-to-image model: {count / 1e6:,.1f}M parameters, p = {config.p}, {config.head.ch_target} "
            f"bits per token, {'with' if weights.tokenizer_folder else 'without'} its tokenizer"
        )
    count = sum(tensor.numel() for tensor in weights.tensors.values())
    if isinstance(weights, ClassConditionalWeights):
        sizes = weights.config
        return (
            f"class-conditional model: {count / 1e6:,.1f}M parameters, {sizes.resolution} px, "
            f"{sizes.parallel_num} tokens a step, {'with' if weights.tokenizer else 'without'} its tokenizer"
        )
    return (
        f"binary tokenizer: {count / 1e6:,.1f}M parameters, {weights.config.downsample} px and "
        f"{weights.config.z_channels} bits per token"
    )
