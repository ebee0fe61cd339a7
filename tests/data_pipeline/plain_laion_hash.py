"""LAION's hash by its plain definition, one row at a time, one block at a time, on Python's integers."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_C1 = 0x87C37B91114253D5
_C2 = 0x4CF5AD432745937F


def plain_laion_hash(url: str | None, text: str | None) -> int:
    """Signed 64-bit join key of a row; any strings, nulls allowed."""
    data = ((url or "") + (text or "")).encode()
    first = _murmur3_x64_128(data)[0]
    return first - (1 << 64) if first >= 1 << 63 else first


def _rotate(value: int, by: int) -> int:
    return ((value << by) | (value >> (64 - by))) & _MASK


def _mix_first(block: int) -> int:
    return (_rotate((block * _C1) & _MASK, 31) * _C2) & _MASK


def _mix_second(block: int) -> int:
    return (_rotate((block * _C2) & _MASK, 33) * _C1) & _MASK


def _avalanche(value: int) -> int:
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & _MASK
    value = ((value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53) & _MASK
    return value ^ (value >> 33)


def _murmur3_x64_128(data: bytes) -> tuple[int, int]:
    """MurmurHash3_x64_128 with seed 0, as published by Austin Appleby: two unsigned halves."""
    h1 = h2 = 0
    whole = len(data) // 16 * 16
    for start in range(0, whole, 16):
        k1 = int.from_bytes(data[start : start + 8], "little")
        k2 = int.from_bytes(data[start + 8 : start + 16], "little")
        h1 = ((_rotate(h1 ^ _mix_first(k1), 27) + h2) * 5 + 0x52DCE729) & _MASK
        h2 = ((_rotate(h2 ^ _mix_second(k2), 31) + h1) * 5 + 0x38495AB5) & _MASK
    # The tail is mixed in as if it were padded with zeros; a zero block mixes to zero.
    h1 ^= _mix_first(int.from_bytes(data[whole : whole + 8], "little"))
    h2 ^= _mix_second(int.from_bytes(data[whole + 8 :], "little"))
    h1, h2 = h1 ^ len(data), h2 ^ len(data)
    h1 = (h1 + h2) & _MASK
    h2 = (h2 + h1) & _MASK
    h1, h2 = _avalanche(h1), _avalanche(h2)
    h1 = (h1 + h2) & _MASK
    return h1, (h2 + h1) & _MASK
