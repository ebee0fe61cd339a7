"""One training sample, laid out as one document.

Caption -> picture ("t2i"), where brackets mark the user's turn, which training drops whole now and then:

    [<|im_start|>user\\n {caption} <|im_end|>\\n] <|im_start|>assistant\\n
    <|vision_start|> <|res_h|> <|res_w|> <|query_1|> ... <|query_{P-1}|> patch_1 ... patch_{M-1}

Picture -> caption ("i2t"), where the picture is a given: it is fed whole and clean, and nothing of it is
predicted:

    <|im_start|>user\\n <|vision_start|> ... patch_1 ... patch_M <|vision_end|> <|im_end|>\\n
    <|im_start|>assistant\\n {caption}

A document ends at the last token that predicts something. The caption and the <|im_end|> after it are text
targets, the template is not. h, w token grid, P tokens of a patch, M = h*w/P patches, C bits per token.

Source: the sequence of `gen_image` and the bit flips of `flip_tensor_elements_uniform_prob`, in modeling/ of
the code published with the paper (arXiv 2602.14041).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.layout.grid import check_grid
from models.layout.tokens import SequenceTokens, TemplateLengths

Task = Literal["t2i", "i2t"]


@dataclass
class Sample:
    """A picture with its caption, and the random draws that training makes for it.

    `flip`, `t` and `noise` belong to pictures that are generated ("t2i"); "i2t" ignores them.
    """

    bits: Tensor
    """[h*w, C] of -1/+1, int8 or float, in plain raster order."""
    h: int
    w: int
    caption_ids: Sequence[int]
    task: Task = "t2i"
    drop_text: bool = False
    """Leave the user's turn out ("t2i" only), which trains the unconditional half of guidance."""
    flip: Tensor | None = None
    """bool [h*w, C] in plain raster order: bits to flip in the input, never in the target."""
    t: Tensor | None = None
    """float32 [M], the time in (0, 1) of each patch: shifted already, as `models.head.draw_times` does."""
    noise: Tensor | None = None
    """float32 [M, P, C], standard normal, in patch raster order."""
    key: str = ""


@dataclass(frozen=True)
class Document:
    """Ids and places of one document; the vision tokens have the placeholder id `<|vision_start|>`."""

    input_ids: list[int]
    first_block: int
    """Place of <|res_w|>, where the first block starts; blocks of P follow one another from here."""
    blocks: int
    """Number of blocks: the queries' and one for each patch that is fed."""
    caption_at: int
    """Place of the first caption token; meaningless where the user's turn was dropped."""


def document_length(
    n_text: int, h: int, w: int, p: int, task: Task, drop_text: bool, template: TemplateLengths
) -> int:
    """Tokens that a sample with a caption of n_text tokens takes in a pack.

    t2i: [user + n_text + turn_end] + assistant + 2 + M*P;
    i2t: user + 2 + P + M*P + 1 + turn_end + assistant + n_text;
    with the lengths of the chat template, `SequenceTokens.template`, which differ between text tokenizers.
    ValueError where the grid does not fit the patches, the caption is empty though it is used, or drop_text
    comes with "i2t".
    """
    _check(n_text, h, w, p, task, drop_text)
    if task == "i2t":
        return 3 + p * p + h * w + sum(template) + n_text
    return 2 + h * w + template.assistant + (0 if drop_text else template.user + n_text + template.turn_end)


def document_targets(n_text: int, h: int, w: int, task: Task, drop_text: bool) -> tuple[int, int]:
    """(vision tokens, text tokens) of a sample that a loss is computed on; the text counts its <|im_end|>."""
    vision = h * w if task == "t2i" else 0
    return vision, 0 if drop_text else n_text + 1


def lay_out(sample: Sample, tokens: SequenceTokens, p: int) -> Document:
    """The document of a sample; ValueError, with the sample's key, where it can't be laid out."""
    try:
        _check(len(sample.caption_ids), sample.h, sample.w, p, sample.task, sample.drop_text)
        picture = tokens.picture_start(sample.h, sample.w)
    except ValueError as error:
        raise ValueError(f"sample {sample.key!r}: {error}") from error
    patches = sample.h * sample.w // (p * p)
    if sample.task == "i2t":
        before, after = list(tokens.user_prefix), [tokens.vision_end, *tokens.turn_end, *tokens.assistant]
        fed = patches
        caption_at = len(before) + len(picture) + fed * p * p + len(after)
        after += sample.caption_ids
    else:
        before = tokens.unconditional_prompt() if sample.drop_text else tokens.prompt(sample.caption_ids)
        after, fed, caption_at = [], patches - 1, len(tokens.user_prefix)
    vision = [tokens.vision_start] * (fed * p * p)
    return Document([*before, *picture, *vision, *after], len(before) + 2, 1 + fed, caption_at)


def _check(n_text: int, h: int, w: int, p: int, task: Task, drop_text: bool) -> None:
    check_grid(h, w, p)
    if task not in ("t2i", "i2t"):
        raise ValueError(f"the task is {task!r}: expected 't2i' (caption -> picture) or 'i2t'")
    if task == "i2t" and drop_text:
        raise ValueError(
            "drop_text leaves the caption out, and 'i2t' has nothing else to learn: drop in 't2i' only"
        )
    if not drop_text and n_text < 1:
        raise ValueError("the caption has no tokens: filter empty captions out, or drop the text")


def draw_flips(shape: Sequence[int], p_max: float, generator: torch.Generator | None = None) -> Tensor:
    """bool [*shape]: which input bits to flip in training, each with probability p_max*u, u ~ U(0, 1).

    shape is that of the bits, [h*w, C] for a sample; p_max lies in [0, 1]. Two uniform draws a, b of the
    whole shape on the CPU, in this order; a bit flips where a < p_max*b, so p_max/2 of them on average.
    The published p_max is 0.1 (text-to-image, class-conditional B) or 0.05 (L and H).
    """
    a = torch.rand(*shape, generator=generator)
    return a < p_max * torch.rand(*shape, generator=generator)


def flip_bits(bits: Tensor, flip: Tensor) -> Tensor:
    """bits [...] of -1/+1, of any signed dtype, with the sign changed where `flip`, bool [...], is true."""
    return torch.where(flip, -bits, bits)
