"""Safetensors files, one tensor or one file at a time: weights larger than memory pass through here.

Tensors may have any shape [...]; dtypes are float64, float32, float16 and bfloat16. Source: the format of
huggingface.co/docs/safetensors, in which the paper's text-to-image weights (arXiv 2602.14041) are published.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.tensor_files.json_files import read_json_object
from models.tensor_files.strict import TensorSpec

# The types that weights are published in; anything else (quantized, 8-bit) is not what these models compute
# with.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

LONGEST_NAME = 255  # bytes, in the usual file systems


class Place(NamedTuple):
    """Where a tensor stands: a file of the folder, and its key in that file."""

    file: str
    key: str


def read_index(folder: Path, index_name: str) -> list[str]:
    """The files that an index (``model.safetensors.index.json``) names, sorted.

    A folder may come from anywhere, so a name must be that of a file in the folder itself.

    Raises:
        ValueError: the index is not readable, or names a path that leads out of the folder or to no file.
    """
    path = folder / index_name
    try:
        files = sorted(set(read_json_object(path, "an index")["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a readable index with a `weight_map` of files ({error!r})") from error
    for name in files:
        if (
            not isinstance(name, str)
            or PurePosixPath(name).name != name
            or "\\" in name
            or name in ("", "..")
            or len(name.encode("utf-8", "replace")) > LONGEST_NAME
        ):
            raise ValueError(
                f"{path}: names the file {reprlib.repr(name)}; expected plain file names of this "
                "folder, such as model-00001-of-00002.safetensors. Do not use this folder: no program "
                "writes such an index"
            )
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path}: names {name!r}; expected safetensors files only")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {', '.join(absent)} is not there, although {index_name} names it; fetch it"
        )
    return files


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """Shapes [...] and dtypes of a file's tensors, from its header alone.

    Raises:
        ValueError: no such file, no whole safetensors file, or a type that is not a float of 16 bits or more.
    """
    specs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict: it has no other way to iterate)
                part = file.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    known = ", ".join(DTYPES)
                    raise ValueError(
                        f"{path}: {key} is stored as {part.get_dtype()}; expected one of {known}"
                    )
                specs[key] = TensorSpec(tuple(part.get_shape()), DTYPES[part.get_dtype()])
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; the folder is not complete, fetch it again") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    return specs


def read_tensors(folder: Path, places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of ``places``; a file is mapped while tensors of it come in a row.

    A tensor has the shape [...] and float dtype that it is stored in, and is a view of the mapped file: copy
    it, or be done with it before the next one. Files and keys have been checked before, by `read_specs`.
    """
    for file_name, entries in itertools.groupby(places.items(), key=lambda entry: entry[1].file):
        with safe_open(folder / file_name, framework="pt") as file:
            for name, place in entries:
                yield name, file.get_tensor(place.key)


class SafetensorsWriter:
    """Writes tensors, as they come, into planned files; a file is written when its last tensor is in.

    Memory: the tensors of the files that have begun, so one file's worth where they come in the plan's order.
    The folder is made where it is missing, and written to directly; to make it appear whole or not at all is
    the caller's business.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], places: Mapping[str, Place]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._specs, self._places = folder, specs, places
        self._waiting: dict[str, set[str]] = {}
        self._held: dict[str, dict[str, Tensor]] = {}
        for name, place in places.items():
            self._waiting.setdefault(place.file, set()).add(name)

    def add(self, name: str, tensor: Tensor, stays: bool = False) -> None:
        """Take a copy of ``tensor``, of the planned shape [...] and any dtype, in the planned dtype.

        One that ``stays`` as it is until `finish`, such as a mapped file's, is written from where it is.

        Raises:
            ValueError: it is not in the plan, misshapen, or has been taken before.
            OSError: its file cannot be written.
        """
        spec, place = self._specs.get(name), self._places.get(name)
        if spec is None or place is None or name not in self._waiting.get(place.file, ()):
            raise ValueError(f"{name}: not among the tensors to be written, or written already")
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: is {list(tensor.shape)}, expected {list(spec.shape)}")
        held = self._held.setdefault(place.file, {})
        tensor = tensor.detach()
        if not (stays and _is_file_like(tensor, spec.dtype, held.values())):
            # The caller may gather the next parameter into the same memory.
            tensor = torch.empty(spec.shape, dtype=spec.dtype).copy_(tensor)
        held[place.key] = tensor
        self._waiting[place.file].discard(name)
        if not self._waiting[place.file]:
            # transformers reads a file only where its metadata names the framework.
            path = self._folder / place.file
            try:
                save_file(self._held.pop(place.file), path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{path}: cannot be written ({error})") from error

    def finish(self) -> None:
        """Raise ValueError unless every planned tensor has been written."""
        missing = sorted(name for names in self._waiting.values() for name in names)
        if missing:
            raise ValueError(
                f"{len(missing)} tensors were not given to the writer: {', '.join(missing[:20])}"
            )


def _is_file_like(tensor: Tensor, dtype: torch.dtype, others: Iterable[Tensor]) -> bool:
    """Whether ``tensor`` lies in memory as it would in a file, sharing none of it with ``others``."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and all(tensor.data_ptr() != other.data_ptr() for other in others)
    )


def plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> tuple[dict[str, Place], dict | None]:
    """Spread tensors over files as transformers does: in their order, each file at most ``shard_bytes``.

    A tensor larger than that has a file of its own. Everything in one file needs no index. A spec tells a
    tensor's shape [...] and the dtype to store it in.

    Returns:
        name -> place (``model.safetensors``, or ``model-00001-of-00007.safetensors`` and so on), and the
        content of ``model.safetensors.index.json`` or None.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return {name: Place("model.safetensors", name) for name in shards[0]}, None
    places = {
        name: Place(f"model-{number:05d}-of-{len(shards):05d}.safetensors", name)
        for number, names in enumerate(shards, start=1)
        for name in names
    }
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": {name: place.file for name, place in sorted(places.items())},
    }
    return places, index
