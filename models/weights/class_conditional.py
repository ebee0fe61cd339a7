"""Class-conditional models: the published ImageNet ``.pt`` in and out, and our own folder of safetensors.

class_conditional_config.json   the fields of `ClassConditionalConfig`
class_conditional.safetensors   the weights, under their published names
ae_config.json, ae.safetensors  the binary tokenizer, where the `.pt` holds one

Source: the weights published with the paper (arXiv 2602.14041), by name and shape [...]; any float dtype.

A ``.pt`` that is written here also holds its configuration, under `class_conditional_config`: tensors do not
tell all of it. Who reads `ema` does not see it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from models.checks import WrongRequest
from models.class_conditional import CLASS_CONDITIONAL_PRESETS, ClassConditionalConfig, ClassConditionalModel
from models.tensor_files.json_files import read_json_object
from models.tensor_files.progress import Progress, silent
from models.tensor_files.safetensors_files import Place, SafetensorsWriter, read_specs, read_tensors
from models.tensor_files.strict import Rule, TensorSpec, check_tensors, explain_by, specs_in, specs_of
from models.tokenizer.files import WEIGHTS_FILE as TOKENIZER_WEIGHTS
from models.tokenizer.files import TokenizerWeights, open_tokenizer, write_tokenizer
from models.weights.modules import build_filled
from models.weights.tokenizer_weights import count_numbered, infer_tokenizer, require_telling
from models.weights.torch_files import STATES, tensors_of

CONFIG_ENTRY = "class_conditional_config"
CONFIG, WEIGHTS = "class_conditional_config.json", "class_conditional.safetensors"
TOKENIZER = "vae."
HEAD_WIDTH = 64  # of every published size

RULES = (
    Rule(r"cls_embedding\..*", CONFIG, ("num_classes", "cls_token_num", "dim")),
    Rule(r"query_token", CONFIG, ("parallel_num", "dim")),
    Rule(r"proj_in\..*", CONFIG, ("latent_dim", "dim")),
    Rule(r"pos_for_diff\..*", CONFIG, ("resolution", "down_size", "dim")),
    Rule(r"head\.net\.ada_ln_blocks\..*", CONFIG, ("diff_adanln_layers", "parallel_num", "diff_dim")),
    Rule(r"head\.net\.res_blocks\..*", CONFIG, ("diff_layers", "parallel_num", "diff_dim")),
    Rule(r"head\..*", CONFIG, ("diff_dim", "dim", "latent_dim")),
    Rule(r".*", CONFIG, ("n_layer", "dim")),
)

TELLING = {  # a size of the model in the shape of a tensor
    "norm.weight": ("dim",),
    "cls_embedding.weight": ("num_classes + 1", "cls_token_num * dim"),
    "pos_for_diff.weight": ("(resolution / down_size)^2", "dim"),
    "proj_in.w1.weight": ("3 * dim", "latent_dim"),
    "head.net.input_proj.weight": ("diff_dim", "latent_dim"),
}


@dataclass(frozen=True)
class ClassConditionalWeights:
    """A class-conditional model, checked; its tensors stay on disk (mapped) until they are read."""

    config: ClassConditionalConfig
    tensors: Mapping[str, Tensor]
    tokenizer: TokenizerWeights | None


def class_conditional_from_file(
    content: Mapping[str, Any], where: str, heads: int | None = None
) -> ClassConditionalWeights:
    """The model in the dictionary of a published ImageNet ``.pt``: its `ema`, or else its `model`.

    Entries under `vae.` are the frozen tokenizer, of which the encoder and the decoder are kept.

    Args:
        content: the dictionary.
        where: the file, for messages.
        heads: attention heads of the transformer, where the file does not tell and they are not 64 wide.

    Raises:
        ValueError: neither entry is there, or its tensors are not exactly one model.
        WrongRequest: ``heads`` is given and contradicts what the file tells.
    """
    entry = next((name for name in STATES if content.get(name) is not None), None)
    if entry is None:
        raise ValueError(f"{where}: neither `ema` nor `model` in it; found {sorted(map(str, content))}")
    state, where = content[entry], f"{where}, {entry}"
    if not isinstance(state, Mapping):
        raise ValueError(f"{where}: a {type(state).__name__}; expected a dictionary of tensors by name")
    tensors = tensors_of({k: v for k, v in state.items() if not str(k).startswith(TOKENIZER)}, where)
    frozen = _frozen_tokenizer(content)
    tokenizer = infer_tokenizer(frozen, f"{where}, {TOKENIZER}*") if frozen else None
    specs = specs_in(tensors)
    down_size = tokenizer.config.downsample if tokenizer else ClassConditionalConfig.down_size
    if CONFIG_ENTRY in content:
        config = _recorded_config(content[CONFIG_ENTRY], where)
        if heads not in (None, config.n_head):
            raise WrongRequest(
                f"{where}: {heads} heads are asked for, but its configuration says {config.n_head}"
            )
    else:
        config = infer_class_conditional_config(specs, down_size, where, heads)
    check_class_conditional_specs(specs, config, where)
    return ClassConditionalWeights(config, tensors, tokenizer)


def _recorded_config(values: Any, where: str) -> ClassConditionalConfig:
    try:
        return ClassConditionalConfig.from_json(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: its `{CONFIG_ENTRY}` describes no class-conditional model ({error})"
        ) from error


def _frozen_tokenizer(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries under `vae.` without that prefix; it is not trained, so an average may have left it out."""
    for name in STATES:
        state = content.get(name)
        if isinstance(state, Mapping):
            found = {k.removeprefix(TOKENIZER): v for k, v in state.items() if str(k).startswith(TOKENIZER)}
            if found:
                return found
    return {}


def class_conditional_from_folder(folder: Path) -> ClassConditionalWeights:
    """The model in a folder that `write_class_conditional_folder` made.

    Raises:
        ValueError: a file is absent or broken, or the tensors are not exactly those of the configuration.
    """
    path = folder / CONFIG
    try:
        config = ClassConditionalConfig.from_json(read_json_object(path, "that of a class-conditional model"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration of a class-conditional model ({error})") from error
    specs = read_specs(folder / WEIGHTS)
    check_class_conditional_specs(specs, config, str(folder))
    tensors = dict(read_tensors(folder, {name: Place(WEIGHTS, name) for name in specs}))
    has_tokenizer = (folder / TOKENIZER_WEIGHTS).is_file()
    return ClassConditionalWeights(config, tensors, open_tokenizer(folder) if has_tokenizer else None)


def write_class_conditional_folder(
    weights: ClassConditionalWeights, folder: Path, progress: Progress = silent
) -> None:
    """Write configuration and weights, in the dtypes that the tensors have. Memory: none beside the tensors.

    progress goes through the model's tensors, and may show how far it is.
    """
    specs = specs_in(weights.tensors)
    writer = SafetensorsWriter(folder, specs, {name: Place(WEIGHTS, name) for name in specs})
    for name, tensor in progress(weights.tensors.items(), len(specs)):
        writer.add(name, tensor, stays=True)
    writer.finish()
    text = json.dumps(weights.config.to_json(), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if weights.tokenizer is not None:
        write_tokenizer(weights.tokenizer, folder)


def write_class_conditional_file(weights: ClassConditionalWeights, file: IO[bytes]) -> None:
    """Write the published form: a ``.pt`` with the weights, and the tokenizer under `vae.`, as `ema`.

    Beside it stands the configuration, so that importing the file gives the same model again.
    """
    state = dict(weights.tensors)
    if weights.tokenizer is not None:
        state |= {TOKENIZER + name: tensor for name, tensor in weights.tokenizer.tensors.items()}
    torch.save({STATES[0]: state, CONFIG_ENTRY: weights.config.to_json()}, file)


def load_class_conditional(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> ClassConditionalModel:
    """The model in ``folder``, in eval mode. ``dtype`` None keeps each tensor as it is stored.

    Raises:
        ValueError: as `class_conditional_from_folder`.
    """
    weights = class_conditional_from_folder(Path(folder))
    tensors = weights.tensors.items()
    model = build_filled(lambda: ClassConditionalModel(weights.config), tensors, dtype, device)
    return model.to(device).eval()


def save_class_conditional(
    model: ClassConditionalModel, folder: str | Path, tokenizer_folder: str | Path | None = None
) -> None:
    """Write ``model``, and the binary tokenizer of ``tokenizer_folder``, in the dtypes that they have."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_tokenizer(Path(tokenizer_folder)) if tokenizer_folder is not None else None
    weights = ClassConditionalWeights(model.config, model.state_dict(), tokenizer)
    write_class_conditional_folder(weights, Path(folder))


def check_class_conditional_specs(
    found: Mapping[str, TensorSpec], config: ClassConditionalConfig, where: str
) -> None:
    """Raise ValueError, with every misfit, unless ``found`` are the tensors of the model of ``config``.

    Names and shapes [...] are compared; the dtypes may be any.
    """
    expected = specs_of(lambda: ClassConditionalModel(config))
    check_tensors(found, expected, where, explain_by(RULES, {CONFIG: config.to_json()}))


def infer_class_conditional_config(
    specs: Mapping[str, TensorSpec], down_size: int, where: str, heads: int | None = None
) -> ClassConditionalConfig:
    """The sizes of the model whose tensors these are.

    What no tensor tells is taken as published: heads 64 wide unless ``heads`` says how many there are, patch
    raster, block-causal mask, the noise of the preset of the same width (0.1 where there is none). For a
    model trained otherwise, change the written `class_conditional_config.json`.

    Args:
        specs: shape [...] of each of the model's tensors, without the tokenizer's; dtypes are not looked at.
        down_size: pixels along the side of a token.
        where: for messages.
        heads: attention heads of the transformer, a divisor of its width.

    Raises:
        ValueError: a tensor that tells a size is absent, the sizes make no model, or the width is no multiple
            of 64 and ``heads`` is None.
    """
    require_telling(specs, TELLING, where, "a class-conditional model")
    width = specs["norm.weight"].shape[0]
    classes, class_tokens = specs["cls_embedding.weight"].shape
    queries = specs.get("query_token", TensorSpec((1, 0, width), torch.float32))
    if heads is None and width % HEAD_WIDTH:
        raise ValueError(
            f"{where}: the model is {width} wide, which heads of {HEAD_WIDTH} (as published) do not divide, "
            "and no tensor tells how many heads there are; give their number"
        )
    like = next((c for c in CLASS_CONDITIONAL_PRESETS.values() if c.dim == width), ClassConditionalConfig())
    try:
        return ClassConditionalConfig(
            dim=width,
            n_layer=count_numbered(specs, r"layers\.(\d+)\..*"),
            n_head=width // HEAD_WIDTH if heads is None else heads,
            diff_layers=count_numbered(specs, r"head\.net\.res_blocks\.(\d+)\..*"),
            diff_dim=specs["head.net.input_proj.weight"].shape[0],
            diff_adanln_layers=count_numbered(specs, r"head\.net\.ada_ln_blocks\.(\d+)\..*"),
            latent_dim=specs["proj_in.w1.weight"].shape[1],
            down_size=down_size,
            resolution=math.isqrt(specs["pos_for_diff.weight"].shape[0]) * down_size,
            cls_token_num=class_tokens // width,
            num_classes=classes - 1,
            perturb_rate=like.perturb_rate,
            parallel_num=queries.shape[1] + 1,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
