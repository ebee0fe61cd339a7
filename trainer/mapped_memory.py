"""Tensors whose memory is a file, for state that is offloaded to a local NVMe disk.

The kernel holds in memory what is in use and writes the rest to the disk, so what is kept may be larger than
the host's memory. Such a tensor is like any other: optimizer, guard and checkpoints need not know. (DeepSpeed
can swap tensors itself, but out of the reach of all three, and with an extension that has to be compiled.)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor

from data_pipeline.store import writing_to


class MappedMemory:
    """Memory in files of one folder. The files have no name: whatever ends the process, their room is free
    again.
    """

    def __init__(self, folder: str):
        """
        Args:
            folder: on the disk; made where it is missing.

        Raises:
            PlaceUnusable: it cannot be written.
        """
        self._folder = folder
        with writing_to(folder):
            os.makedirs(folder, exist_ok=True)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of the shape and type of ``tensor``.

        Raises:
            PlaceUnusable: the disk has no room for them.
        """
        storage = self._storage(tensor.numel() * tensor.element_size())
        return torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)

    def move(self, tensors: Iterable[Tensor]) -> None:
        """Move tensors here in place, values and all; those that share memory go on sharing it. What is in no
        host memory stays where it is.

        Raises:
            PlaceUnusable: the disk has no room for them.
        """
        moved: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            old = tensor.untyped_storage()
            if tensor.device.type != "cpu" or not old.nbytes():
                continue
            place = old.data_ptr()
            if place not in moved:
                moved[place] = self._storage(old.nbytes())
                moved[place].copy_(old)
            layout = tensor.storage_offset(), tensor.size(), tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(moved[place], *layout)

    def _storage(self, size: int) -> torch.UntypedStorage:
        with writing_to(self._folder):
            file, path = tempfile.mkstemp(dir=self._folder)
            try:
                # A file without its blocks would end the process by a signal where the disk is full later on.
                os.posix_fallocate(file, 0, size)
                return torch.from_file(path, shared=True, size=size, dtype=torch.uint8).untyped_storage()
            finally:
                os.close(file)
                os.unlink(path)
