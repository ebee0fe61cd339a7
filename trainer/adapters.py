"""Low-rank adapters on the backbone: how they get in, what they start as, how they end in plain weights.

Stored weights have the names of the published layout; in a model with adapters the weight under one is called
`...q_proj.base_layer.weight`, and the adapter `...q_proj.lora_A.default.weight` (A, [rank, in]) and
`...lora_B...` (B, [out, rank]). Without adapters (``lora`` None) both names are the same.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from models.text_to_image import TextToImageModel
from models.weights import ModelSource
from trainer.model_recipe import LoraSection


def add_adapters(model: TextToImageModel, lora: LoraSection) -> None:
    """Put adapters into the backbone and freeze the rest of it; projector and head stay trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and only divides it by r
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    inject_adapter_in_model(config, model.llm)


def parameter_name(stored: str, lora: LoraSection | None) -> str:
    """What the stored weight ``stored`` is called in the model that is trained."""
    return f"{_module(stored)}.base_layer.weight" if _is_adapted(stored, lora) else stored


def adapter_names(stored: str, lora: LoraSection | None) -> tuple[str, str] | None:
    """Names of A and B of the adapter over the stored weight ``stored``; None where it has none."""
    if not _is_adapted(stored, lora):
        return None
    module = _module(stored)
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


def adapter_shapes(stored: str, lora: LoraSection | None) -> dict[str, tuple[int, int]]:
    """Name -> shape of A and B over the stored weight ``stored``, -1 for what follows from their elements."""
    names = adapter_names(stored, lora)
    if names is None:
        return {}
    assert lora is not None
    return {names[0]: (lora.rank, -1), names[1]: (-1, lora.rank)}


def adapter_sizes(stored: str, shape: Sequence[int], lora: LoraSection | None) -> tuple[int, ...]:
    """Elements of A and B over the stored weight ``stored`` of this shape; () where it has no adapter."""
    if not _is_adapted(stored, lora):
        return ()
    assert lora is not None
    rows, columns = shape
    return lora.rank * columns, rows * lora.rank


def start_tensors(source: ModelSource, lora: LoraSection | None, seed: int) -> Iterator[tuple[str, Tensor]]:
    """All parameters that a stage starts with, by their names in the model, one at a time.

    An adapter starts as peft starts it: A uniform in ±1/sqrt(in), B zero, so that it adds nothing at first.
    """
    for stored, tensor in source.tensors():
        yield parameter_name(stored, lora), tensor
        names = adapter_names(stored, lora)
        if names is not None:
            assert lora is not None
            rows, columns = tensor.shape
            key = hashlib.sha256(f"{seed} {stored}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
            down = nn.init.kaiming_uniform_(
                torch.empty(lora.rank, columns), a=math.sqrt(5), generator=generator
            )
            yield names[0], down
            yield names[1], torch.zeros(rows, lora.rank)


def merged(stored: str, lora: LoraSection | None, whole: Callable[[str], Tensor]) -> Tensor:
    """The stored weight ``stored`` of a trained model: float32 W + alpha/rank * B A, or just W.

    Args:
        whole: gives a parameter of the model by its name, whole.
    """
    weight = whole(parameter_name(stored, lora)).float()
    names = adapter_names(stored, lora)
    if names is None:
        return weight
    assert lora is not None
    down, up = (whole(name).float() for name in names)
    return weight + (up @ down) * (lora.alpha / lora.rank)


def seed_dropout(seed: int, step: int, rank: int, micro_step: int) -> None:
    """Make what adapters drop in one micro-step a function of these numbers, and not of what ran before."""
    key = hashlib.sha256(f"{seed} {step} {rank} {micro_step}".encode()).digest()[:8]
    torch.manual_seed(int.from_bytes(key, "little"))


def _module(stored: str) -> str:
    return stored.removesuffix(".weight")


def _is_adapted(stored: str, lora: LoraSection | None) -> bool:
    if lora is None:
        return False
    targets = "|".join(lora.targets)
    return re.fullmatch(rf"llm\.model\.layers\.\d+\.\w+\.({targets})\.weight", stored) is not None
