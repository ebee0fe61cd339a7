"""Writes a one-dimensional `.npy` file piece by piece, without knowing its length beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HEADER_BYTES = 128


class NpyStream:
    """Appends arrays to an `.npy` file (format 1.0); the length goes into the header at the end.

    Args:
        path: to be created.
        dtype: of all pieces; a structured one must have a short description, for the header's size is fixed.
    """

    def __init__(self, path: Path, dtype: DTypeLike):
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = open(path, "wb")  # noqa: SIM115  (closed by __exit__)
        self._file.write(b"\0" * HEADER_BYTES)

    def append(self, piece: NDArray[Any]) -> None:
        """Append a one-dimensional array."""
        assert piece.ndim == 1
        self._file.write(np.ascontiguousarray(piece, self.dtype).tobytes())
        self.length += len(piece)

    def __enter__(self) -> NpyStream:
        return self

    def __exit__(self, *exception: object) -> None:
        described = np.lib.format.dtype_to_descr(self.dtype)
        fields = f"{{'descr': {described!r}, 'fortran_order': False, 'shape': ({self.length},), }}"
        start = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
        assert len(start) + len(fields) < HEADER_BYTES
        self._file.seek(0)
        self._file.write(start + fields.encode().ljust(HEADER_BYTES - 11) + b"\n")
        self._file.close()
