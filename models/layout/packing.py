"""Several documents in one sequence, as the tensors that the model's training forward takes.

T packed tokens, C bits per token, P tokens of a patch, N patches predicted, V vision tokens fed, L text
targets. Source: what stands where is as in `forward_train` of modeling/mllm.py in the code published with the
paper (arXiv 2602.14041).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from models.layout.documents import Document, Sample, flip_bits, lay_out
from models.layout.grid import grid_places, to_patch_raster
from models.layout.tokens import SequenceTokens


@dataclass
class PackedBatch:
    """One packed sequence. Integers are int64, bits and draws float32; "place" is an index into T."""

    input_ids: Tensor
    """[T]; a placeholder where vision tokens stand."""
    position_ids: Tensor
    """[T]: 0, 1, 2, ... in each document, for RoPE."""
    document_ids: Tensor
    """[T]: 0, 1, ... by document."""
    block_ids: Tensor
    """[T]: -1 where a token is causal only, else the number of its block, unique in the pack."""
    vision_at: Tensor
    """[V] places of the vision tokens that are fed."""
    vision_bits: Tensor
    """[V, C] of -1/+1, flips applied."""
    vision_rows: Tensor
    """[V] row of each token in its own picture's grid."""
    vision_cols: Tensor
    """[V] column, likewise."""
    predict_at: Tensor
    """[N*P] places whose hidden states predict a patch."""
    predict_rows: Tensor
    """[N*P] row of the token that each of them predicts."""
    predict_cols: Tensor
    """[N*P] column, likewise."""
    target_bits: Tensor
    """[N, P, C] of -1/+1, never flipped."""
    t: Tensor
    """[N] time of each patch, shifted already."""
    noise: Tensor
    """[N, P, C] standard normal."""
    patch_sample: Tensor
    """[N] index into `keys` of the sample that a patch belongs to."""
    text_at: Tensor
    """[L] places whose hidden states predict a text token."""
    text_labels: Tensor
    """[L] ids of the tokens that they predict."""
    text_sample: Tensor
    """[L] index into `keys`."""
    keys: list[str]

    def _mapped(self, change: Any) -> "PackedBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PackedBatch(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The same batch with its tensors on `device`; dtypes stay."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Page-locked, so that `to(..., non_blocking=True)` overlaps with computation. Needs a GPU."""
        return self._mapped(Tensor.pin_memory)


def pack(samples: Sequence[Sample], tokens: SequenceTokens, p: int) -> PackedBatch:
    """Lay samples out one after the other, p x p tokens a patch; tensors on the CPU.

    Flips are applied to inputs only, and everything is brought into patch raster order. No samples give a
    pack of one token without any target, so that a rank that has nothing to do in a micro-step can take part
    in its collective operations. ValueError where `tokens` are those of another p, or, with the sample's key,
    where a sample can't be laid out: its grid, its caption, or the shapes of its bits, t or noise.
    """
    if len(tokens.query) != p * p - 1:
        raise ValueError(f"{p}x{p} patches need {p * p - 1} query tokens, found {len(tokens.query)}")
    if not samples:
        return _join([_idle_part(tokens, p)], [])
    parts, length, blocks = [], 0, 0
    for index, sample in enumerate(samples):
        document = lay_out(sample, tokens, p)
        part = _text_part(sample, document, tokens, p, index) | _vision_part(sample, document, p, index)
        for name in ("vision_at", "predict_at", "text_at"):
            part[name] += length
        part["block_ids"][part["block_ids"] >= 0] += blocks
        length, blocks = length + len(document.input_ids), blocks + document.blocks
        parts.append(part)
    return _join(parts, [sample.key for sample in samples])


def _join(parts: list[dict[str, Tensor]], keys: list[str]) -> PackedBatch:
    return PackedBatch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, keys=keys)


def _text_part(
    sample: Sample, document: Document, tokens: SequenceTokens, p: int, index: int
) -> dict[str, Tensor]:
    length, end = len(document.input_ids), document.first_block + document.blocks * p * p
    block_ids = torch.full((length,), -1)
    block_ids[document.first_block : end] = torch.arange(document.blocks).repeat_interleave(p * p)
    labels = [] if sample.drop_text else [*sample.caption_ids, tokens.im_end]
    if labels and not document.caption_at:
        raise ValueError(
            f"sample {sample.key!r}: a caption at the very start of a document can't be predicted"
        )
    return {
        "input_ids": torch.tensor(document.input_ids),
        "position_ids": torch.arange(length),
        "document_ids": torch.full((length,), index),
        "block_ids": block_ids,
        "text_at": document.caption_at - 1 + torch.arange(len(labels)),
        "text_labels": torch.tensor(labels, dtype=torch.int64),
        "text_sample": torch.full((len(labels),), index),
    }


def _vision_part(sample: Sample, document: Document, p: int, index: int) -> dict[str, Tensor]:
    h, w = sample.h, sample.w
    P, C = p * p, sample.bits.shape[-1]
    if sample.bits.shape != (h * w, C):
        raise ValueError(f"sample {sample.key!r}: bits are {tuple(sample.bits.shape)}, expected {(h * w, C)}")
    generated = sample.task == "t2i"
    bits = to_patch_raster(sample.bits, h, w, p).float()
    rows, cols = grid_places(h, w, p)
    fed = (document.blocks - 1) * P
    shown = bits
    if generated and sample.flip is not None:
        shown = flip_bits(bits, to_patch_raster(sample.flip, h, w, p))
    predicted = h * w if generated else 0
    t, noise = _draws(sample, predicted // P, P, C)
    return {
        "vision_at": document.first_block + P + torch.arange(fed),
        "vision_bits": shown[:fed],
        "vision_rows": rows[:fed],
        "vision_cols": cols[:fed],
        "predict_at": document.first_block + torch.arange(predicted),
        "predict_rows": rows[:predicted],
        "predict_cols": cols[:predicted],
        "target_bits": bits[:predicted].view(-1, P, C),
        "t": t,
        "noise": noise,
        "patch_sample": torch.full((predicted // P,), index),
    }


def _draws(sample: Sample, patches: int, P: int, C: int) -> tuple[Tensor, Tensor]:
    """t [N] and noise [N, P, C] of a sample, checked; none for a picture that is not generated."""
    if not patches:
        return torch.zeros(0), torch.zeros(0, P, C)
    if sample.t is None or sample.noise is None:
        raise ValueError(f"sample {sample.key!r}: a picture to generate needs its draws t and noise")
    found, expected = (sample.t.shape, sample.noise.shape), ((patches,), (patches, P, C))
    if found != expected:
        raise ValueError(f"sample {sample.key!r}: t and noise have the shapes {found}, expected {expected}")
    return sample.t.float(), sample.noise.float()


def _idle_part(tokens: SequenceTokens, p: int) -> dict[str, Tensor]:
    """One <|im_start|> and nothing to learn. Its C is 0: nobody told it."""
    nowhere, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, p * p, 0)
    names = ["vision_at", "vision_rows", "vision_cols", "predict_at", "predict_rows", "predict_cols"]
    names += ["patch_sample", "text_at", "text_labels", "text_sample"]
    return {
        "input_ids": torch.tensor([tokens.im_start]),
        "position_ids": torch.zeros(1, dtype=torch.int64),
        "document_ids": torch.zeros(1, dtype=torch.int64),
        "block_ids": torch.full((1,), -1),
        "vision_bits": torch.zeros(0, 0),
        "target_bits": nothing,
        "t": torch.zeros(0),
        "noise": nothing,
    } | dict.fromkeys(names, nowhere)
