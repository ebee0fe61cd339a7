"""What a stage starts from, where it has no checkpoint: an export, a pretrained language model, or random
weights.

All three are a `ModelSource`: a configuration, a text tokenizer, and tensors that stream by one at a time, so
that no rank ever holds a whole model that is meant to be sharded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen3Config

from data_pipeline.latents import LatentDataset
from data_pipeline.tokenize.captions import text_tokenizer_hash
from foundation.errors import DataError, Problems, RecipeError
from models.backbone import read_backbone_config, why_not_fused
from models.flow_settings import FlowSettings
from models.generation import check_request
from models.head import DiffusionHead, HeadConfig
from models.layout import add_sequence_tokens, encode_prompt
from models.projector import Projector
from models.tensor_files.safetensors_files import Place, read_index, read_specs, read_tensors
from models.text_to_image import TextToImageConfig, TextToImageModel
from models.text_tokens import load_text_tokenizer
from models.tokenizer import read_tokenizer_config, tokenizer_fingerprint
from models.weights import ModelSource, expected_specs, grow_patch, locate, open_folder, stored_specs
from models.weights.grow import grow_rows
from models.weights.layout import (
    EMBEDDING,
    HEAD,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    LLM,
    LLM_CONFIG,
    LLM_INDEX,
    LLM_WHOLE,
    OUTPUT,
    PROJECTOR,
    PROJECTOR_WEIGHTS,
)
from trainer.lineage import read_export_manifest
from trainer.model_recipe import HeadSection
from trainer.recipe import SamplesSection, StageRecipe
from trainer.run_folder import EXPORT_MANIFEST


def open_start(recipe: StageRecipe) -> ModelSource:
    """The model that the recipe starts from; no weights are read yet.

    Raises:
        RecipeError: what the recipe names is missing or broken, or has another p than the recipe says.
        DataError: the record of an export of ours is damaged.
    """
    try:
        if recipe.model.init_from is not None:
            return _from_export(recipe, recipe.model.init_from)
        if recipe.model.pretrained is not None:
            return _from_language_model(recipe)
        return _from_nothing(recipe)
    except ValueError as error:
        raise RecipeError(f"This stage cannot start: {error}") from error


def start_files(recipe: StageRecipe) -> list[Path]:
    """Where the model that `open_start` opens has weights and configuration; [] of a random one."""
    if recipe.model.init_from is None and recipe.model.pretrained is None:
        return []
    folder = _start_folder(recipe)
    names = [LLM_CONFIG, *_language_model_files(folder)]
    if recipe.model.init_from is not None:
        names += [HEAD_CONFIG, HEAD_WEIGHTS, PROJECTOR_WEIGHTS]
    return [folder / name for name in names]


def check_dataset(recipe: StageRecipe, source: ModelSource, dataset: LatentDataset) -> None:
    """Refuse latents that the model, or the tokenizer that goes into the export, cannot belong to.

    Raises:
        DataError: all that does not fit.
        RecipeError: what is to be sampled on the way is no request that the model can answer.
    """
    problems, where, manifest = Problems(), recipe.data.latents, dataset.manifest
    made_by = manifest.tokenizer.fingerprint
    folders = {"tokenizer": Path(recipe.tokenizer)}
    if source.tokenizer_folder is not None:
        folders["model.init_from"] = source.tokenizer_folder
    for key, folder in folders.items():
        try:
            found = tokenizer_fingerprint(folder)
        except ValueError as error:
            problems.add(key, str(error), "name the folder of the tokenizer that made the latents")
            continue
        if found != made_by:
            problems.add(
                key,
                f"the tokenizer in {folder} has the fingerprint {found[:12]}, the latents were made by "
                f"{made_by[:12]}",
                "tokenize the pictures anew, or name the tokenizer that made these latents",
            )
    bits = source.config.head.ch_target
    if manifest.tokenizer.bits_per_token != bits:
        problems.add(
            where, f"its tokens have {manifest.tokenizer.bits_per_token} bits, those of the model {bits}"
        )
    _check_vocabulary(recipe, source, dataset, problems)
    problems.raise_if_any(DataError, f"The latents in {where} do not belong to this model")
    if recipe.samples is not None:
        _check_samples(recipe.samples, source)


def refuse_kernels(recipe: StageRecipe, device_type: str) -> str | None:
    """Why the backbone's norms and gated products are not left to fused kernels; None where they are.

    Raises:
        RecipeError: the recipe requires them, and they cannot be had.
    """
    if recipe.fused_kernels == "never":
        return "fused_kernels: never"
    reason = why_not_fused(device_type)
    if reason is not None and recipe.fused_kernels == "required":
        raise RecipeError(
            f"fused_kernels is required, and they cannot be had here: {reason}. They need a GPU and "
            "liger-kernel (pip install '.[gpu]'); with auto, torch computes where they are missing"
        )
    return reason


def _check_samples(samples: SamplesSection, source: ModelSource) -> None:
    """By the sampler's own rules, which else would be met only after a checkpoint, beside the training."""
    found, downsample = f"samples.size is {list(samples.size)}", source.config.tokenizer_downsample
    side = downsample * source.config.p
    height, width = samples.size
    if height % side or width % side:
        raise RecipeError(f"{found}: expected multiples of {side} pixels")
    prompts = [encode_prompt(source.text_tokenizer, prompt) for prompt in samples.prompts]
    grid, flow = (height // downsample, width // downsample), FlowSettings(samples.guidance, samples.steps)
    try:
        check_request(source.config, source.tokens, prompts, grid, 1, flow)
    except ValueError as error:
        raise RecipeError(f"{found}, and its pictures cannot be sampled: {error}") from error


def _check_vocabulary(
    recipe: StageRecipe, source: ModelSource, dataset: LatentDataset, problems: Problems
) -> None:
    """Whether the latents' captions were counted with the model's text tokenizer."""
    made_by, found = dataset.manifest.text_tokenizer, text_tokenizer_hash(source.text_tokenizer)
    if found != made_by.sha256:
        problems.add(
            recipe.data.latents,
            f"its captions were counted with the text tokenizer {made_by.name} ({made_by.sha256[:12]}); the "
            f"model's has another vocabulary ({found[:12]})",
            "tokenize the pictures anew with the model's text tokenizer, or start from a model with this one",
        )


def _from_export(recipe: StageRecipe, name: str) -> ModelSource:
    folder = _start_folder(recipe)
    source, manifest = open_folder(folder), read_export_manifest(folder)
    vocabulary = text_tokenizer_hash(source.text_tokenizer)
    if manifest is not None and manifest.get("vocabulary_sha256") != vocabulary:
        raise ValueError(
            f"the text tokenizer in {name} is not the one that its model was trained with (its vocabulary "
            f"differs from what {EXPORT_MANIFEST} there says): restore it from the run that exported it"
        )
    wanted, found, grow_from = recipe.model.p, source.config.p, recipe.model.grow_from
    if grow_from is not None and grow_from != found:
        raise ValueError(f"{name} has p = {found}, but model.grow_from says {grow_from}")
    if wanted == found:
        return source
    if grow_from is None:
        raise ValueError(
            f"{name} has p = {found}, the recipe p = {wanted}. To make the missing query tokens from those "
            f"that are there, say so: model.grow_from: {found}"
        )
    return grow_patch(source, wanted, recipe.seed)


def _from_nothing(recipe: StageRecipe) -> ModelSource:
    random, head = recipe.model.random, recipe.model.head
    assert random is not None and head is not None
    text_tokenizer = load_text_tokenizer(random.text_tokenizer)
    add_sequence_tokens(text_tokenizer, recipe.model.p)
    llm = Qwen3Config(
        vocab_size=len(text_tokenizer), use_cache=False, rms_norm_eps=1e-6, **random.backbone.model_dump()
    )
    config = _config(recipe, llm, head)
    return ModelSource(
        config=config,
        text_tokenizer=text_tokenizer,
        tokenizer_folder=None,
        specs=expected_specs(config),
        tensors=lambda: _fresh_tensors(config, recipe.seed),
    )


def _from_language_model(recipe: StageRecipe) -> ModelSource:
    """A published Qwen3: its own weights, new rows for the new tokens, a fresh head and projector."""
    head = recipe.model.head
    assert head is not None
    folder = _start_folder(recipe)
    text_tokenizer = load_text_tokenizer(folder)
    known = len(text_tokenizer)
    add_sequence_tokens(text_tokenizer, recipe.model.p)
    found = read_backbone_config(folder / LLM_CONFIG)
    llm = copy.deepcopy(found)
    # Qwen pads its embedding: new tokens take those rows first, and only the rest is added.
    llm.vocab_size = max(found.vocab_size, len(text_tokenizer))
    llm.use_cache = False
    config = _config(recipe, llm, head)
    specs = expected_specs(config)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        new = range(known, len(text_tokenizer))
        for name, tensor in _language_model_tensors(folder, found):
            if name in (EMBEDDING, OUTPUT):
                tensor = grow_rows(tensor, range(known), new, llm.vocab_size, recipe.seed + (name == OUTPUT))
            yield name, tensor
        yield from _fresh_vision_tensors(config, recipe.seed)

    return ModelSource(config, text_tokenizer, None, specs, tensors)


def _start_folder(recipe: StageRecipe) -> Path:
    """Here, fetched where it is on the hub; of a start that is not random."""
    if recipe.model.init_from is not None:
        return locate(recipe.model.init_from)
    name = recipe.model.pretrained
    assert name is not None
    return locate(name if Path(name).exists() or name.startswith("hf:") else f"hf:{name}")


def _language_model_files(folder: Path) -> list[str]:
    return read_index(folder, LLM_INDEX) if (folder / LLM_INDEX).is_file() else [LLM_WHOLE]


def _language_model_tensors(folder: Path, config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    for file in _language_model_files(folder):
        places = {LLM + name: Place(file, name) for name in read_specs(folder / file)}
        if config.tie_word_embeddings:
            places.pop(OUTPUT, None)  # Qwen's small models are published with a copy of the embedding
        yield from read_tensors(folder, places)


def _fresh_tensors(config: TextToImageConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random weights, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextToImageModel(config)
    state = model.state_dict()
    for name in stored_specs(model):
        yield name, state[name]


def _fresh_vision_tensors(config: TextToImageConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random weights of the parts that no language model brings, without memory for the one that it does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            PROJECTOR: Projector(config.head.ch_target, config.llm.hidden_size),
            HEAD: DiffusionHead(config.head),
        }
    for prefix, part in parts.items():
        yield from ((prefix + name, tensor) for name, tensor in part.state_dict().items())


def _config(recipe: StageRecipe, llm: Qwen3Config, head: HeadSection) -> TextToImageConfig:
    tokenizer = read_tokenizer_config(recipe.tokenizer)
    fresh = fresh_head_config(head, recipe.model.p, tokenizer.z_channels, llm.hidden_size)
    return TextToImageConfig(llm, fresh, tokenizer.downsample)


def fresh_head_config(head: HeadSection, p: int, bits: int, width: int) -> HeadConfig:
    """The head of a model that starts without one: C = ``bits``, on a backbone of ``width`` D."""
    return HeadConfig(
        ch_target=bits,
        ch_cond=width,
        ch_latent=head.width,
        depth_latent=head.depth,
        depth_adanln=head.adaln,
        time_shift=head.time_shift,
        P_mean=head.P_mean,
        P_std=head.P_std,
        parallel_num=p**2,
        use_swiglu=head.swiglu,
    )
