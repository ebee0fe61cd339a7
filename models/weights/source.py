"""A text-to-image folder, opened: its configuration read, its tensors checked, none of them read yet.

Source: names and shapes are those of the weights published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.backbone import read_backbone_config
from models.head import HeadConfig
from models.layout import SequenceTokens, sequence_tokens
from models.tensor_files.json_files import read_json_object
from models.tensor_files.safetensors_files import Place, read_index, read_specs, read_tensors
from models.tensor_files.strict import TensorSpec, check_tensors, explain_by, module_specs
from models.text_to_image import TextToImageConfig, TextToImageModel
from models.text_tokens import load_text_tokenizer
from models.tokenizer import read_tokenizer_config
from models.tokenizer.files import CONFIG_FILE as TOKENIZER_CONFIG
from models.tokenizer.files import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from models.tokenizer.files import open_tokenizer
from models.weights import layout


@dataclass(frozen=True)
class ModelSource:
    """Everything that a text-to-image model is made of, with the weights still to be streamed."""

    config: TextToImageConfig
    text_tokenizer: PreTrainedTokenizerFast
    tokenizer_folder: Path | None
    """Where `ae_config.json` and `ae.safetensors` stand; None where the model came without them."""
    specs: Mapping[str, TensorSpec]
    """Shape and dtype of each tensor, in the key space `llm.*`, `projector.*`, `vision_head.*`."""
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Starts a pass over (name, tensor), in the order of `specs`; a tensor is valid until the next one."""

    @property
    def tokens(self) -> SequenceTokens:
        """Ids of the special tokens that this model's sequences are built from."""
        return sequence_tokens(self.text_tokenizer, self.config.p)


def read_folder_config(folder: str | Path) -> TextToImageConfig:
    """The configuration of a text-to-image folder; reads no weights and no tokenizer.

    The tokenizer's downsampling comes from `ae_config.json`; it is 16 where that file is absent.

    Raises:
        ValueError: config files are absent, malformed or of another kind of model, which is told of all of
            them together; or they do not fit one another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise ValueError(
            f"{folder}: {found}; expected a folder with {layout.LLM_CONFIG} and {layout.HEAD_CONFIG}"
        )
    has_tokenizer = (folder / TOKENIZER_CONFIG).is_file()
    llm, head, tokenizer = _together(
        lambda: read_backbone_config(folder / layout.LLM_CONFIG),
        lambda: _read_head_config(folder / layout.HEAD_CONFIG),
        lambda: read_tokenizer_config(folder) if has_tokenizer else None,
    )
    try:
        if tokenizer is None:
            return TextToImageConfig(llm, head)
        return TextToImageConfig(llm, head, tokenizer.downsample)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _together(*reads: Callable[[], Any]) -> list[Any]:
    """What each of `reads` returns; one ValueError with the messages of all that fail."""
    results, messages = [], []
    for read in reads:
        try:
            results.append(read())
        except ValueError as error:
            messages.append(str(error))
    if messages:
        raise ValueError("\n".join(messages))
    return results


def _read_head_config(path: Path) -> HeadConfig:
    values = read_json_object(path, "that of a text-to-image model")
    try:
        return HeadConfig.from_json(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_folder(folder: str | Path) -> ModelSource:
    """Open a published folder, or an export of training, and check that its tensors are exactly the model's.

    Raises:
        ValueError: as `read_folder_config`; or the text tokenizer lacks a special token of the sequences; or
            tensors are missing, unexpected or misshapen (all are listed, with the config value behind each).
    """
    folder = Path(folder)
    config = read_folder_config(folder)
    places, specs = _find_tensors(folder)
    expected = expected_specs(config)
    redundant = config.llm.tie_word_embeddings and layout.OUTPUT in specs
    if redundant:  # Qwen's own small models are published with a copy of the embedding as `lm_head`
        _check_tied(folder, places)
        del places[layout.OUTPUT], specs[layout.OUTPUT]
    configs = {layout.LLM_CONFIG: config.llm.to_dict(), layout.HEAD_CONFIG: config.head.to_json()}
    check_tensors(specs, expected, str(folder), explain_by(layout.RULES, configs))
    has_tokenizer = (folder / TOKENIZER_WEIGHTS).is_file()
    if has_tokenizer:
        _check_tokenizer(folder, config.head.ch_target)
    text_tokenizer = load_text_tokenizer(folder)
    _check_vocabulary(folder, text_tokenizer, config)
    return ModelSource(
        config=config,
        text_tokenizer=text_tokenizer,
        tokenizer_folder=folder if has_tokenizer else None,
        specs={name: specs[name] for name in expected},
        tensors=lambda: read_tensors(folder, {name: places[name] for name in expected}),
    )


def expected_specs(config: TextToImageConfig) -> dict[str, TensorSpec]:
    """Names and shapes [...] of a model's tensors as they are stored, found without memory for its weights.

    The dtypes are those of a new model: what files hold may differ.
    """
    with torch.device("meta"):
        return stored_specs(TextToImageModel(config))


def stored_specs(model: TextToImageModel) -> dict[str, TensorSpec]:
    """Name, shape [...] and dtype of each tensor of ``model`` that a folder holds; tied embeddings once."""
    specs = module_specs(model)
    if model.config.llm.tie_word_embeddings:
        del specs[layout.OUTPUT]
    return specs


def _find_tensors(folder: Path) -> tuple[dict[str, Place], dict[str, TensorSpec]]:
    """Places and specs of all tensors of the three parts, from the headers of their files."""
    whole = not (folder / layout.LLM_INDEX).is_file()
    shards = [layout.LLM_WHOLE] if whole else read_index(folder, layout.LLM_INDEX)
    parts = [(layout.LLM, file) for file in shards]
    parts += [(layout.PROJECTOR, layout.PROJECTOR_WEIGHTS), (layout.HEAD, layout.HEAD_WEIGHTS)]
    places: dict[str, Place] = {}
    specs: dict[str, TensorSpec] = {}
    for prefix, file in parts:
        for key, spec in read_specs(folder / file).items():
            if prefix + key in places:
                raise ValueError(f"{folder}: {key} stands in {places[prefix + key].file} and in {file}")
            places[prefix + key], specs[prefix + key] = Place(file, key), spec
    return places, specs


def _check_tied(folder: Path, places: Mapping[str, Place]) -> None:
    both = {name: places[name] for name in (layout.EMBEDDING, layout.OUTPUT) if name in places}
    tensors = [tensor.clone() for _, tensor in read_tensors(folder, both)]
    if len(tensors) == 2 and not torch.equal(*tensors):
        raise ValueError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, although {layout.LLM_CONFIG} "
            "has tie_word_embeddings = true; set it to false, or remove lm_head.weight"
        )


def with_tokenizer(source: ModelSource, folder: Path | None) -> ModelSource:
    """``source`` with the binary tokenizer of ``folder``; with its own where that is None.

    Raises:
        ValueError: there is neither, or the tokenizer in ``folder`` is not whole, or is not the model's.
    """
    if folder is None:
        if source.tokenizer_folder is None:
            raise ValueError(
                f"the model came without its binary tokenizer ({TOKENIZER_WEIGHTS}), which a "
                "published folder holds; name the tokenizer's folder"
            )
        return source
    downsample = _check_tokenizer(folder, source.config.head.ch_target)
    config = dataclasses.replace(source.config, tokenizer_downsample=downsample)
    return dataclasses.replace(source, config=config, tokenizer_folder=folder)


def _check_tokenizer(folder: Path, bits: int) -> int:
    """The downsampling of the tokenizer in ``folder``; ValueError unless it is whole, and of so many bits."""
    config = read_tokenizer_config(folder)
    if config.z_channels != bits:
        raise ValueError(
            f"{folder}: {TOKENIZER_CONFIG} has z_channels = {config.z_channels}, but the model's "
            f"{layout.HEAD_CONFIG} has ch_target = {bits}: it was trained with another tokenizer"
        )
    return open_tokenizer(folder).config.downsample


def _check_vocabulary(
    folder: Path, text_tokenizer: PreTrainedTokenizerFast, config: TextToImageConfig
) -> None:
    try:
        sequence_tokens(text_tokenizer, config.p)
    except ValueError as error:
        raise ValueError(
            f"{folder}: {layout.HEAD_CONFIG} has parallel_num = {config.head.parallel_num}, but {error}"
        ) from error
    if len(text_tokenizer) > config.llm.vocab_size:
        raise ValueError(
            f"{folder}: the text tokenizer has {len(text_tokenizer)} tokens, but {layout.LLM_CONFIG} has "
            f"vocab_size = {config.llm.vocab_size}; take both from the same model"
        )
