"""The `hash` column of LAION-Aesthetics: the key by which its score tables are joined.

It is the first half, as a signed 64-bit integer, of the 128-bit MurmurHash3 (x64 variant, seed 0; Austin
Appleby's) of the URL followed by the text, both in UTF-8, a null counting as the empty string.

DuckDB has no such function, and a value a row in Python takes minutes for a million: so NumPy mixes the
n-th block of all rows of a batch at once.
"""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType
from duckdb.sqltypes import BIGINT, VARCHAR
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_BLOCK = 16
_C1, _C2 = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)


def register_laion_hash(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `laion_hash(url, text)` a function of the connection's SQL."""
    connection.create_function(
        "laion_hash",
        laion_hash,
        [VARCHAR, VARCHAR],
        BIGINT,
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )


def laion_hash(urls: pa.Array, texts: pa.Array) -> pa.Array:
    """Join keys, int64 [rows], of texts [rows] each; nulls allowed."""
    parts = [pc.fill_null(column.cast(pa.large_string()), "") for column in (urls, texts)]
    joined = pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))
    if isinstance(joined, pa.ChunkedArray):
        joined = joined.combine_chunks()
    _, offsets, data = joined.buffers()
    ends = np.frombuffer(offsets, np.int64)[joined.offset : joined.offset + len(joined) + 1]
    # Zeros behind the last row, since words are read that begin up to a block's length behind its end.
    text = np.zeros(ends[-1] + 2 * _BLOCK, np.uint8)
    text[: ends[-1]] = np.frombuffer(data or b"", np.uint8)[: ends[-1]]
    return pa.array(_murmur3_x64_128(text, ends[:-1], np.diff(ends)).view(np.int64))


def _murmur3_x64_128(text: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> Words:
    """First halves, uint64 [rows], of the hashes of `text[start : start + size]`."""
    # The 64-bit word at every byte, wherever it is aligned.
    words: Words = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))
    # The longest first, so that the rows with a further block are always those up to a number.
    order = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[order], sizes[order]
    blocks = sizes // _BLOCK
    h1, h2 = np.zeros(len(order), np.uint64), np.zeros(len(order), np.uint64)
    for block in range(int(blocks[0]) if len(order) else 0):
        some = slice(np.searchsorted(-blocks, -block))
        at = starts[some] + block * _BLOCK
        h1[some] = (_rotated(h1[some] ^ _mixed(words[at], _C1, 31, _C2), 27) + h2[some]) * 5 + 0x52DCE729
        h2[some] = (_rotated(h2[some] ^ _mixed(words[at + 8], _C2, 33, _C1), 31) + h1[some]) * 5 + 0x38495AB5
    # What is left of a row is mixed in as if zeros followed; a zero word mixes to zero.
    at, left = starts + blocks * _BLOCK, sizes % _BLOCK
    h1 ^= _mixed(_first_bytes(words[at], left), _C1, 31, _C2)
    h2 ^= _mixed(_first_bytes(words[at + 8], left - 8), _C2, 33, _C1)
    h1, h2 = h1 ^ sizes.astype(np.uint64), h2 ^ sizes.astype(np.uint64)
    h1 += h2
    h2 += h1
    found = np.empty_like(h1)
    found[order] = _avalanche(h1) + _avalanche(h2)
    return found


def _rotated(values: Words, by: int) -> Words:
    return (values << np.uint64(by)) | (values >> np.uint64(64 - by))


def _mixed(words: Words, first: np.uint64, by: int, second: np.uint64) -> Words:
    return _rotated(words * first, by) * second


def _first_bytes(words: Words, count: NDArray[np.int64]) -> Words:
    """The words with all but their first `count` bytes zero; below 0 as 0, above 8 as 8."""
    dropped = (8 * (8 - np.clip(count, 0, 8))).astype(np.uint64)
    # A shift by all 64 bits would do nothing.
    return np.where(dropped == 64, 0, words << np.minimum(dropped, 63) >> np.minimum(dropped, 63))


def _avalanche(values: Words) -> Words:
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
