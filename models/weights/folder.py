"""Text-to-image models in and out of folders in the published layout.

Source: the weights published with the paper (arXiv 2602.14041); see layout.py for their files.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.layout import SequenceTokens
from models.tensor_files.json_files import read_json_object
from models.tensor_files.progress import Progress, silent
from models.tensor_files.safetensors_files import SafetensorsWriter
from models.tensor_files.strict import TensorSpec
from models.text_to_image import TextToImageConfig, TextToImageModel
from models.tokenizer.files import CONFIG_FILE as TOKENIZER_CONFIG
from models.tokenizer.files import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from models.weights import layout
from models.weights.grow import grow_patch
from models.weights.modules import build_filled
from models.weights.source import ModelSource, open_folder, stored_specs


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that is needed to train it further or to sample it."""

    model: TextToImageModel
    text_tokenizer: PreTrainedTokenizerFast
    tokens: SequenceTokens
    tokenizer_folder: Path | None
    """Folder of the binary tokenizer (`ae_config.json`, `ae.safetensors`); None where there is none."""


def load_folder(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    p: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a published folder or an export of training.

    Memory: the model in ``dtype`` plus the file that is being read.

    Args:
        folder: the folder.
        dtype: of all weights; None keeps each tensor as it is stored.
        device: where the weights go, tensor by tensor.
        p: side of the patches in tokens, where it is to be larger than the folder's: see `grow_patch`.
        seed: of the new query embeddings, where p is larger.

    Raises:
        ValueError: the folder is not a whole text-to-image model (see `open_folder`), or p does not suit it.
    """
    source = open_folder(folder)
    if p is not None and p != source.config.p:
        source = grow_patch(source, p, seed)
    model = build_model(source, dtype, device)
    return LoadedModel(model, source.text_tokenizer, source.tokens, source.tokenizer_folder)


def build_model(
    source: ModelSource, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> TextToImageModel:
    """The model of ``source`` in eval mode, its weights streamed in; dtype None keeps each tensor's own."""
    model = build_filled(lambda: TextToImageModel(source.config), source.tensors(), dtype, device)
    model.llm.tie_weights()
    return model.to(device).eval()


def save_folder(
    model: TextToImageModel,
    text_tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    tokenizer_folder: str | Path | None = None,
    extra_json: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write ``model`` as a published folder, in the dtype that its parameters have. See `FolderWriter`.

    Raises:
        OSError: a file cannot be written, or ``tokenizer_folder`` lacks one of the tokenizer's.
    """
    writer = FolderWriter(folder, model.config, stored_specs(model))
    state = model.state_dict()
    for name in writer.names:
        writer.add(name, state[name])
    writer.finish(text_tokenizer, tokenizer_folder, extra_json)


def write_source(
    source: ModelSource,
    folder: str | Path,
    shard_bytes: int = layout.SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write the model of ``source`` to another folder, in its own dtypes, holding one file at a time.

    Raises:
        OSError: a file cannot be written.
    """
    writer = FolderWriter(folder, source.config, source.specs, shard_bytes)
    for name, tensor in progress(source.tensors(), len(source.specs)):
        writer.add(name, tensor)
    writer.finish(source.text_tokenizer, source.tokenizer_folder)


class FolderWriter:
    """Writes a published folder from tensors that come one by one, for example gathered from many ranks.

        writer = FolderWriter(partial, config, specs)
        for name in writer.names:
            writer.add(name, gather(name))
        writer.finish(text_tokenizer, tokenizer_folder)

    Memory: the tensors of the files that have begun; in the order of `names`, one file. The folder is written
    to directly: write to a partial one and rename it, where it must appear whole or not at all.

    Args:
        folder: made where it is missing.
        config: of the model.
        specs: name -> shape and the dtype to store, for every tensor, in the key space `llm.*`,
            `projector.*`, `vision_head.*`; without `llm.lm_head.weight` where the embeddings are tied (see
            `stored_specs`).
        shard_bytes: largest size of a file of the language model.

    Raises:
        ValueError: a name in ``specs`` is outside that key space.
    """

    def __init__(
        self,
        folder: str | Path,
        config: TextToImageConfig,
        specs: Mapping[str, TensorSpec],
        shard_bytes: int = layout.SHARD_BYTES,
    ) -> None:
        self._folder = Path(folder)
        self._config = config
        self._dtype = specs[layout.EMBEDDING].dtype
        places, self._index = layout.plan_files(specs, shard_bytes)
        self.names = tuple(places)
        """All tensors, file by file."""
        self._weights = SafetensorsWriter(self._folder, specs, places)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, of the planned shape [...] and any float dtype, from any device.

        Raises:
            ValueError: it is unknown, misshapen, or has been added before.
            OSError: its file cannot be written.
        """
        self._weights.add(name, tensor)

    def finish(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        tokenizer_folder: str | Path | None = None,
        extra_json: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write what is not weights of the model.

        Args:
            text_tokenizer: with the tokens of the model's sequences.
            tokenizer_folder: where to copy the binary tokenizer from; None leaves it out.
            extra_json: file name -> content of further JSON files, such as the lineage.

        Raises:
            ValueError: some tensors have not been added.
            OSError: a file cannot be written, or ``tokenizer_folder`` lacks one of the tokenizer's.
        """
        self._weights.finish()
        if self._index is not None:
            self._write_json(layout.LLM_INDEX, self._index)
        self._save_llm_config()
        self._write_json(layout.HEAD_CONFIG, self._config.head.to_json())
        text_tokenizer.save_pretrained(self._folder)
        if tokenizer_folder is not None:
            for name in (TOKENIZER_CONFIG, TOKENIZER_WEIGHTS):
                shutil.copyfile(Path(tokenizer_folder) / name, self._folder / name)
        for name, content in (extra_json or {}).items():
            self._write_json(name, content)

    def _save_llm_config(self) -> None:
        """As transformers would for a model of its own, so that it finds class and dtype there."""
        config = copy.deepcopy(self._config.llm)
        config.architectures = ["Qwen3ForCausalLM"]
        config.dtype = self._dtype
        config.use_cache = True  # switched off for training; whoever generates text wants it
        config.save_pretrained(self._folder)
        values = read_json_object(self._folder / layout.LLM_CONFIG, "what was written just now")
        # transformers 5 writes it in `rope_parameters` alone, where 4, the published code's, does not look.
        base = values.get("rope_theta") or values["rope_parameters"]["rope_theta"]
        self._write_json(layout.LLM_CONFIG, {**values, "rope_theta": base})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
