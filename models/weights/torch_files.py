"""PyTorch's own ``.pt`` files: read without running anything that they bring along.

Source: the paper's class-conditional models and tokenizers (arXiv 2602.14041) are published in such files.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.tensor_files.safetensors_files import DTYPES

STATES = ("ema", "model")  # of a class-conditional file, one or both; the average gives the published numbers
STATE_DICT = "state_dict"  # of a tokenizer's file
BEFORE_ZIP = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickled number it began with


def read_torch_file(path: Path) -> Mapping[str, Any]:
    """The dictionary in a ``.pt`` file. Its tensors stay on disk (mapped) until they are read.

    Such a file is a pickle, which could run any code. Only tensors, numbers, text and containers are taken.

    Raises:
        ValueError: no such file, not a whole file, something other than plain data inside, or no dictionary.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, because it holds more than tensors and plain values{_foreign(path)}, and "
            "reading those would run code from the file. Expected weights alone. Only if you trust the file, "
            "take them out of it in Python, which does run that code, and import again.pt: "
            f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            f"torch.save({{k: c[k] for k in {(*STATES, STATE_DICT)} if k in c}}, 'again.pt')"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if _is_before_zip(path):
            raise ValueError(
                f"{path}: written in the form that torch.save had before PyTorch 1.6, which cannot be read "
                "tensor by tensor. Save it again in the present one: "
                f"torch.save(torch.load({str(path)!r}, weights_only=True), 'again.pt')"
            ) from error
        raise ValueError(
            f"{path}: not a whole file of torch.save in its zip format; fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a dictionary of weights")
    return content


def tensors_of(entry: object, where: str) -> dict[str, Tensor]:
    """``entry`` as a state dict: tensors of any shape [...] by name, without their gradients.

    ValueError naming what in it is no dense tensor of float64, float32, float16 or bfloat16.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: a {type(entry).__name__}; expected a dictionary of tensors by name")
    foreign = [
        f"{name!r} ({_kind(value)})"
        for name, value in entry.items()
        if not (isinstance(name, str) and _is_weight(value))
    ]
    if foreign:
        shown = ", ".join(foreign[:20]) + (f" and {len(foreign) - 20} more" if len(foreign) > 20 else "")
        raise ValueError(f"{where}: expected dense float tensors only ({', '.join(DTYPES)}), found {shown}")
    return {name: value.detach() for name, value in entry.items()}


def _is_weight(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    return value.layout == torch.strided and value.dtype in DTYPES.values()


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype}, {'without values' if value.is_meta else value.layout}"


def _is_before_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(BEFORE_ZIP)) == BEFORE_ZIP
    except OSError:
        return False


def _foreign(path: Path) -> str:
    """What a refused file wants to import, for the message; the list is read without importing it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError):
        return ""
    return f" ({', '.join(sorted(names)[:10])})" if names else ""
