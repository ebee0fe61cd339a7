"""The special tokens of a text-to-image sequence.

The chat template of the language model carries caption and picture; `<|res_k|>` names a side of k tokens, and
`<|query_1|>` ... `<|query_{P-1}|>` fill the first block, from which the first patch is predicted. Source:
data/data_utils.py of the code published with the paper (arXiv 2602.14041).
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

from models.layout.grid import MAX_SIDE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_USER, _TURN_END, _ASSISTANT = f"{_IM_START}user\n", f"{_IM_END}\n", f"{_IM_START}assistant\n"


def plain_ids(ids: Any) -> list[int]:
    """Token ids `[n]` as a list of plain numbers, from any sequence, array or tensor of whole numbers.

    ValueError on anything else.
    """
    try:
        return [index(value) for value in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise ValueError(
            f"{reprlib.repr(ids)} are no token ids: expected a list or a tensor [n] of whole numbers, made "
            "of a caption by the text tokenizer"
        ) from error


class TemplateLengths(NamedTuple):
    """Tokens of the three parts of the chat template: 3, 2 and 3 with the Qwen3 text tokenizers."""

    user: int
    turn_end: int
    assistant: int


@dataclass(frozen=True)
class SequenceTokens:
    """Token ids that a sequence is built from. P = p*p tokens per step.

    `sequence_tokens` reads them off a text tokenizer; they may as well be given by hand.
    """

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    res: Mapping[int, int]
    """k, the side of a grid in tokens, to the id of `<|res_k|>`."""
    query: tuple[int, ...]
    """ids of `<|query_1|>` ... `<|query_{P-1}|>`."""
    user_prefix: tuple[int, ...]
    """`<|im_start|>user\\n`"""
    turn_end: tuple[int, ...]
    """`<|im_end|>\\n`"""
    assistant: tuple[int, ...]
    """`<|im_start|>assistant\\n`"""

    @property
    def template(self) -> TemplateLengths:
        """Lengths in tokens of `user_prefix`, `turn_end` and `assistant`."""
        return TemplateLengths(len(self.user_prefix), len(self.turn_end), len(self.assistant))

    def prompt(self, caption_ids: "Sequence[int] | Tensor") -> list[int]:
        """The conditional prompt of a caption: the user's turn and the assistant's opening.

        ValueError where the caption has no tokens, or is none (see `plain_ids`).
        """
        ids = plain_ids(caption_ids)
        if not ids:
            raise ValueError("the prompt is empty: give a caption of at least one token")
        return [*self.user_prefix, *ids, *self.turn_end, *self.assistant]

    def unconditional_prompt(self) -> list[int]:
        """The prompt of the unconditional half of guidance: the user's turn is left out whole."""
        return list(self.assistant)

    def picture_start(self, h: int, w: int) -> list[int]:
        """`<|vision_start|> <|res_h|> <|res_w|> <|query_1|> ... <|query_{P-1}|>`.

        ValueError where a side has no token. The last P of them are the first block.
        """
        for side in (h, w):
            if side not in self.res:
                raise ValueError(f"no <|res_{side}|> token: a grid of {h}x{w} tokens can't be named")
        return [self.vision_start, self.res[h], self.res[w], *self.query]


def _added_tokens(p: int) -> list[str]:
    sides = [f"<|res_{k}|>" for k in range(1, MAX_SIDE + 1)]
    return sides + [f"<|query_{i}|>" for i in range(1, p * p)]


def add_sequence_tokens(text_tokenizer: "PreTrainedTokenizerBase", p: int) -> int:
    """Add `<|res_1|>` ... `<|res_256|>`, then `<|query_1|>` ... `<|query_{p*p-1}|>`, where they are missing.

    Returns how many were added; the embedding of the model must have `len(text_tokenizer)` rows afterwards.
    """
    from transformers import AddedToken

    tokens = [AddedToken(token, special=True, normalized=False) for token in _added_tokens(p)]
    return text_tokenizer.add_tokens(tokens, special_tokens=True)


def sequence_tokens(text_tokenizer: "PreTrainedTokenizerBase", p: int) -> SequenceTokens:
    """Look the tokens of p x p patches up; ValueError with the missing ones, where there are any."""
    added = _added_tokens(p)
    vocabulary = text_tokenizer.get_vocab()
    required = [_IM_START, _IM_END, _VISION_START, _VISION_END, *added]
    missing = [token for token in required if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the text tokenizer lacks {len(missing)} tokens that {p}x{p} patches need ({missing[0]} ... "
            f"{missing[-1]}): add them with add_sequence_tokens, or use the tokenizer of a {p}x{p} model"
        )

    def ids(text: str) -> tuple[int, ...]:
        return tuple(text_tokenizer.encode(text, add_special_tokens=False))

    return SequenceTokens(
        im_start=vocabulary[_IM_START],
        im_end=vocabulary[_IM_END],
        vision_start=vocabulary[_VISION_START],
        vision_end=vocabulary[_VISION_END],
        res={k: vocabulary[added[k - 1]] for k in range(1, MAX_SIDE + 1)},
        query=tuple(vocabulary[token] for token in added[MAX_SIDE:]),
        user_prefix=ids(_USER),
        turn_end=ids(_TURN_END),
        assistant=ids(_ASSISTANT),
    )


def encode_prompt(text_tokenizer: "PreTrainedTokenizerBase", caption: str) -> list[int]:
    """The conditional prompt of a caption, encoded as one text, which is how the published code does it.

    These are the ids of `SequenceTokens.prompt` wherever the caption begins with something visible, as all
    captions of training do. White space at its beginning may join the template's line break in one token.
    """
    ids: list[int] = text_tokenizer.encode(
        f"{_USER}{caption}{_TURN_END}{_ASSISTANT}", add_special_tokens=False
    )
    return ids
