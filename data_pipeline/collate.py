"""From a planned sample and its record to what the sequence layout takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data_pipeline.global_batch import SampleRef
from data_pipeline.records import LatentRecord, unpack_bits
from data_pipeline.sample_randomness import SampleDraws
from foundation.errors import DataError
from models.layout import Sample

EncodeCaption = Callable[[str], list[int]]
"""A caption to its token ids, without any special token."""


def collate(
    ref: SampleRef, record: LatentRecord, encode: EncodeCaption, draws: SampleDraws, channels: int
) -> Sample:
    """One sample, ready to be packed.

    Args:
        ref: what the plan says about it.
        record: what was read for it.
        encode: the text tokenizer that the dataset was counted with.
        draws: of the recipe's seed.
        channels: C, bits a token.

    Raises:
        DataError: the record is not what the plan was made for: another size, or a caption of another
            number of tokens than the side index says. Lengths, and the counts that losses are divided by,
            would be wrong.
    """
    caption_ids = encode(record.caption)
    where = f"the sample {record.key!r} ({ref.name})"
    if (record.h, record.w) != (ref.h, ref.w):
        raise DataError(
            f"{where} has {record.h}x{record.w} tokens, the side index says {ref.h}x{ref.w}: run "
            "`bitdance data verify`, then `bitdance data finalize`"
        )
    if len(caption_ids) != ref.n_text:
        raise DataError(
            f"{where} has a caption of {len(caption_ids)} tokens, the side index says {ref.n_text}: train "
            "with the text tokenizer that the dataset was made with; if it is, run `bitdance data verify`"
        )
    try:
        bits = torch.from_numpy(unpack_bits(record.bits, record.h, record.w, channels))
    except ValueError as error:
        raise DataError(f"{where}: {error}; run `bitdance data verify`") from error
    sample = Sample(bits, ref.h, ref.w, caption_ids, ref.task, ref.drop_text, key=record.key)
    if ref.task == "t2i":  # a picture that is given, not generated, is fed clean, and nothing is drawn for it
        drawn = draws.draw(ref.resolution, ref.position, ref.h, ref.w)
        sample.flip, sample.t, sample.noise = drawn.flip, drawn.t, drawn.noise
    return sample
