"""One latent record: the unit that the offline pipeline writes and that training reads by id.

Bits are packed eight to a byte. The order is the plain raster order of the token grid: row by row,
within a row column by column, within a token its C bits from channel 0 on. Within a byte the first bit
is the least significant one ("little" order). A set bit means +1, a cleared bit means -1. So a 256 px
picture at 16x down and 32 bits a token is 16 * 16 * 32 / 8 = 1024 bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# MDS stores the columns sorted by name; no encoding is a pickle. A `bytes` column costs a quarter less to
# write than `ndarray:uint8`.
LATENT_COLUMNS: dict[str, str] = {
    "bits": "bytes",
    "caption": "str",
    "h": "uint16",
    "key": "str",
    "n_text": "uint16",
    "scores": "str",
    "w": "uint16",
}
MAX_TEXT_TOKENS = 65_535  # n_text is stored as uint16, in the records and in the side index

_SIZES, _UINT16 = struct.Struct("<4I"), struct.Struct("<H")
_SCORES = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False)


@dataclass(frozen=True)
class LatentRecord:
    """A picture as bits, with its caption.

    Attributes:
        bits: packed bits, `ceil(h * w * C / 8)` bytes in the order that this module's docstring gives.
        h: rows of the token grid.
        w: columns of the token grid.
        caption: the caption, already cut to the recipe's limit of tokens.
        n_text: tokens of `caption` under the dataset's text tokenizer, without any special token.
        key: names the picture in logs and in the quarantine list; unique in its task's part of a class. What
            tells records of a whole class apart is their sample id: two input folders may hold equal names.
        scores: the values that the filters used, by name; JSON scalars only.
    """

    bits: bytes
    h: int
    w: int
    caption: str
    n_text: int
    key: str
    scores: dict[str, Any] = field(default_factory=dict)

    def to_mds(self) -> dict[str, Any]:
        """The record as `MDSWriter.write` takes it, with the columns of `LATENT_COLUMNS`.

        Equal records give equal bytes: the scores are written as JSON with sorted keys.
        """
        return {
            "bits": self.bits,
            "caption": self.caption,
            "h": np.uint16(self.h),
            "key": self.key,
            "n_text": np.uint16(self.n_text),
            "scores": _SCORES.encode(self.scores),
            "w": np.uint16(self.w),
        }

    def to_bytes(self) -> bytes:
        """The record as it lies in an MDS shard: u32 sizes of the variable columns, then all columns by name.

        The same bytes as MDSWriter makes of `to_mds`, which looks up each column's codec anew: four times the
        cost.

        Raises:
            struct.error: h, w or n_text does not fit 16 bits.
        """
        bits, scores = self.bits, _SCORES.encode(self.scores).encode()
        caption, key = self.caption.encode(), self.key.encode()
        sizes = _SIZES.pack(len(bits), len(caption), len(key), len(scores))
        h, n_text, w = _UINT16.pack(self.h), _UINT16.pack(self.n_text), _UINT16.pack(self.w)
        return b"".join((sizes, bits, caption, h, key, n_text, scores, w))

    @classmethod
    def from_mds(cls, row: dict[str, Any]) -> LatentRecord:
        """The inverse of `to_mds`, from what an MDS reader returns.

        Raises:
            KeyError: a column is missing.
            ValueError: the scores are not a JSON object.
        """
        scores = json.loads(row["scores"])
        if not isinstance(scores, dict):
            raise ValueError(
                f"record {row['key']!r}: the scores are {type(scores).__name__}, not a JSON object"
            )
        return cls(
            bits=row["bits"],
            h=int(row["h"]),
            w=int(row["w"]),
            caption=row["caption"],
            n_text=int(row["n_text"]),
            key=row["key"],
            scores=scores,
        )


def packed_size(h: int, w: int, channels: int) -> int:
    """Bytes that the bits of an h x w grid with `channels` bits a token take."""
    return (h * w * channels + 7) // 8


def pack_bits(bits: NDArray[Any]) -> bytes:
    """Pack bits of -1/+1 into bytes.

    Args:
        bits: `[h*w, C]`, plain raster order, any numeric dtype, values exactly -1 or +1.

    Returns:
        `ceil(h*w*C / 8)` bytes; unused bits of the last byte are zero.

    Raises:
        ValueError: not two-dimensional, or a value other than -1 and +1 (NaN included).
    """
    if bits.ndim != 2:
        raise ValueError(f"bits must be [h*w, C], found {bits.ndim} dimensions: {bits.shape}")
    positive = bits == 1
    if not bool(np.all(positive | (bits == -1))):
        raise ValueError("bits must be exactly -1 or +1; binarize the encoder's output before packing")
    return np.packbits(positive.reshape(-1), bitorder="little").tobytes()


def unpack_bits(packed: bytes, h: int, w: int, channels: int) -> NDArray[np.int8]:
    """The inverse of `pack_bits`.

    Returns:
        `[h*w, C]` int8 of -1/+1, plain raster order.

    Raises:
        ValueError: `packed` does not have exactly the size that h, w and channels imply.
    """
    expected = packed_size(h, w, channels)
    if len(packed) != expected:
        raise ValueError(
            f"{len(packed)} bytes of bits, expected {expected} for {h} x {w} tokens of {channels} bits"
        )
    flat = np.unpackbits(np.frombuffer(packed, np.uint8), count=h * w * channels, bitorder="little")
    return (flat.astype(np.int8) * 2 - 1).reshape(h * w, channels)
