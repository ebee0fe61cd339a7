"""One sample: its draws, in their documented order, and the checks against the side index."""

import dataclasses

import numpy as np
import pytest
import torch
from latent_folder import CHANNELS, GRIDS, encode_caption, latent_record

from data_pipeline.collate import collate
from data_pipeline.global_batch import SampleRef
from data_pipeline.records import unpack_bits
from data_pipeline.sample_randomness import SampleDraws
from foundation.errors import DataError
from models.head import HeadConfig
from models.head.schedule import shift

HEAD = HeadConfig(ch_target=CHANNELS, ch_cond=16, ch_latent=128, depth_latent=2, parallel_num=4)
RECORD = latent_record(128, 3, GRIDS[128])
REF = SampleRef(128, 77, 3, "t2i", False, RECORD.n_text, RECORD.h, RECORD.w, length=99)


def test_draws_come_from_philox_by_seed_class_and_position_in_the_documented_order() -> None:
    drawn = SampleDraws(9, 0.1, HEAD).draw(128, 77, 4, 12)
    generator = np.random.Generator(np.random.Philox(key=[9, 128], counter=[0, 0, 77, 0]))
    a = generator.random((48, CHANNELS), np.float32)
    b = generator.random((48, CHANNELS), np.float32)
    n = torch.from_numpy(generator.standard_normal(12, np.float32))
    noise = torch.from_numpy(generator.standard_normal((12, 4, CHANNELS), np.float32))
    assert torch.equal(drawn.flip, torch.from_numpy(a < np.float32(0.1) * b))
    assert torch.equal(drawn.t, torch.sigmoid(0.8 * n - 0.8)) and drawn.t.dtype == torch.float32
    assert torch.equal(drawn.noise, noise)


def test_draws_differ_by_seed_class_and_position_and_repeat() -> None:
    draws = SampleDraws(9, 0.1, HEAD)
    first = draws.draw(128, 77, 8, 8).noise
    assert torch.equal(first, draws.draw(128, 77, 8, 8).noise)
    others = [
        draws.draw(128, 78, 8, 8),
        draws.draw(256, 77, 8, 8),
        SampleDraws(8, 0.1, HEAD).draw(128, 77, 8, 8),
    ]
    assert all(not torch.isin(first, other.noise).any() for other in others)


def test_half_of_p_max_of_the_bits_flip() -> None:
    flips = torch.cat([SampleDraws(1, 0.1, HEAD).draw(64, i, 64, 64).flip for i in range(20)])
    assert abs(flips.float().mean().item() - 0.05) < 0.002
    assert not SampleDraws(1, 0.0, HEAD).draw(64, 0, 64, 64).flip.any()


def test_times_follow_the_head() -> None:
    uniform = dataclasses.replace(HEAD, time_schedule="uniform", parallel_num=1)
    t = SampleDraws(1, 0.1, uniform).draw(64, 0, 64, 64).t
    assert abs(t.mean().item() - 0.5) < 0.02 and abs(t.std().item() - 12**-0.5) < 0.02
    shifted = SampleDraws(1, 0.1, dataclasses.replace(uniform, time_shift=3.0)).draw(64, 0, 64, 64).t
    assert torch.equal(shifted, shift(t, 3.0)) and not torch.equal(shifted, t)
    with pytest.raises(ValueError, match="diff_batch_mul"):
        SampleDraws(1, 0.1, dataclasses.replace(HEAD, diff_batch_mul=4))


def test_a_sample_carries_the_record_and_its_draws() -> None:
    draws = SampleDraws(9, 0.1, HEAD)
    sample = collate(REF, RECORD, encode_caption, draws, CHANNELS)
    assert sample.bits.numpy().tolist() == unpack_bits(RECORD.bits, RECORD.h, RECORD.w, CHANNELS).tolist()
    assert (sample.key, sample.h, sample.w, sample.task) == (RECORD.key, RECORD.h, RECORD.w, "t2i")
    assert list(sample.caption_ids) == encode_caption(RECORD.caption)
    expected = draws.draw(128, 77, RECORD.h, RECORD.w)
    assert sample.noise is not None and torch.equal(sample.noise, expected.noise)
    given = collate(dataclasses.replace(REF, task="i2t"), RECORD, encode_caption, draws, CHANNELS)
    assert given.flip is None and given.t is None and given.noise is None


@pytest.mark.parametrize(
    ("ref", "record", "message"),
    [
        (dataclasses.replace(REF, n_text=REF.n_text + 1), RECORD, "text tokenizer"),
        (dataclasses.replace(REF, h=8, w=8), RECORD, "the side index says 8x8"),
        (REF, dataclasses.replace(RECORD, bits=RECORD.bits[:-1]), "bytes of bits"),
    ],
)
def test_a_record_that_the_plan_was_not_made_for_is_refused_by_key(ref, record, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=message) as caught:
        collate(ref, record, encode_caption, SampleDraws(9, 0.1, HEAD), CHANNELS)
    assert "'128-00003'" in str(caught.value)
