"""Latent records: the bit order on disk, and that nothing is lost."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.records import LATENT_COLUMNS, LatentRecord, pack_bits, packed_size, unpack_bits
from data_pipeline.streaming_import import MDSWriter
from data_pipeline.tokenize.writer import Source, TaskWriter

LIMIT = 4000  # bytes of a shard: the last record gets its own


def test_bit_order_is_raster_channels_first_bit_lowest():
    # Two tokens of 8 bits: token 0 has only channel 0 set, token 1 only channels 1 and 7.
    bits = -np.ones((2, 8), np.int8)
    bits[0, 0] = 1
    bits[1, [1, 7]] = 1
    assert pack_bits(bits) == bytes([0b00000001, 0b10000010])


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(h, w, channels, seed):
    bits = np.random.default_rng(seed).integers(0, 2, (h * w, channels)).astype(np.float32) * 2 - 1
    packed = pack_bits(bits)
    assert len(packed) == packed_size(h, w, channels)
    # The plain definition, one bit at a time.
    flat = bits.reshape(-1)
    for i, value in enumerate(flat):
        assert (packed[i // 8] >> (i % 8) & 1) == (value == 1)
    np.testing.assert_array_equal(unpack_bits(packed, h, w, channels), bits)


@pytest.mark.parametrize("value", [0.0, 0.5, 2.0, float("nan")])
def test_values_that_are_no_bits_are_refused(value):
    bits = np.ones((4, 8), np.float32)
    bits[2, 3] = value
    with pytest.raises(ValueError, match="exactly -1 or"):
        pack_bits(bits)


def test_wrong_length_is_refused():
    with pytest.raises(ValueError, match="expected 8 for 2 x 4"):
        unpack_bits(b"\0" * 7, 2, 4, 8)


def test_record_round_trip():
    record = LatentRecord(b"\1\2", 1, 2, "ein Bär", 3, "k", {"b": 1.5, "a": None})
    row = record.to_mds()
    assert row["scores"] == '{"a":null,"b":1.5}'
    assert LatentRecord.from_mds(row) == record


def test_the_bytes_are_those_that_the_library_writes(tmp_path):
    """Columns of any length, empty and non-ASCII ones among them."""
    writer = MDSWriter(columns=LATENT_COLUMNS, out=str(tmp_path / "mds"), hashes=["sha256"], size_limit=LIMIT)
    records = [
        LatentRecord(b"", 0, 0, "", 0, "", {}),
        LatentRecord(b"\x01\xff", 1, 65535, "Löwe \U0001f981", 65535, "k-é", {"b": 1.5, "a": None, "c": "ü"}),
        LatentRecord(bytes(range(256)) * 16, 32, 32, "a caption", 3, "000000001", {"aesthetic": 5.25}),
    ]
    for record in records:
        assert record.to_bytes() == writer.encode_sample(record.to_mds())
        writer.write(record.to_mds())
    writer.finish()
    task = TaskWriter(tmp_path, LIMIT)
    for record in records:
        task.write(64, 0, record, Source(0, 0, 0.0))
    task.finish()
    assert len(list((tmp_path / "64").glob("*.mds"))) == 2
    for path in (tmp_path / "64").iterdir():
        assert path.read_bytes() == (tmp_path / "mds" / path.name).read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        LatentRecord(b"", 1, 1, "", 0, "", {"a": float("nan")}).to_bytes()
    with pytest.raises(struct.error):
        LatentRecord(b"", 65536, 1, "", 0, "").to_bytes()
