"""Text tokenizers: a small byte-level BPE of one's own, or Qwen's (by its hub name, or from a folder).

Both are transformers fast tokenizers whose special tokens have Qwen's spellings, so that the rest of the
code, and whoever loads an exported model, cannot tell one from the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"

# Qwen's special tokens, in the order of their ids. The sequence layout needs five; the others are here
# so that a caption that contains one is read the same way by the small tokenizer and by Qwen's.
QWEN_SPECIAL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
REQUIRED_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END)

BYTES = 256  # the alphabet of a byte-level BPE: no text is ever unknown to it


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts`` and give it Qwen's special tokens.

    Args:
        texts: captions; any iterable, read once.
        vocab_size: the largest size wanted, special tokens included; at least 270 (256 bytes and 14 special
            tokens). Few texts may not have so many distinct pieces; then the vocabulary is smaller.

    Returns:
        A fast tokenizer: byte pieces and merges have the ids from 0, then come the special tokens. It is
        lossless on text in Unicode's composed form (NFC), to which it brings all text first, as Qwen's does.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and the special tokens.
    """
    smallest = BYTES + len(QWEN_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {smallest}: {BYTES} bytes and "
            f"{len(QWEN_SPECIAL_TOKENS)} special tokens"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(QWEN_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # The special tokens come last, as in Qwen's own vocabulary, where they follow the pieces and the merges.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(QWEN_SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )


def load_text_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder, or by its name on the hub such as ``Qwen/Qwen3-14B``.

    A folder of that name on this machine wins over the hub. No code that comes with a tokenizer is run.

    Raises:
        ValueError: nothing found under ``source``, not a fast tokenizer, or without Qwen's special tokens.
    """
    where = str(source)
    is_folder = os.path.isdir(where)
    if not is_folder and (
        isinstance(source, Path) or where.startswith((".", "/", "~")) or where.count("/") > 1
    ):
        raise ValueError(
            f"{where}: no such folder; expected one with tokenizer.json, or a name like Qwen/Qwen3-14B"
        )
    files = set(os.listdir(where)) if is_folder else set()
    if is_folder and "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise ValueError(
            f"{where}: no tokenizer.json, nor vocab.json and merges.txt, in this folder; name one with them"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "mend or replace the files of this folder" if is_folder else "check the name and the connection"
        raise ValueError(f"{where}: the text tokenizer cannot be loaded ({reason}); {fix}") from error
    check_text_tokenizer(tokenizer, where)
    return tokenizer


def check_text_tokenizer(tokenizer: object, where: str) -> None:
    """Raise ValueError unless ``tokenizer`` is fast and has each special token that the sequences need."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{where}: a {type(tokenizer).__name__}, expected a fast tokenizer (with tokenizer.json)"
        )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in REQUIRED_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{where}: the text tokenizer lacks the special tokens {', '.join(missing)}; "
            "expected the tokenizer of a Qwen model, or one made by train_text_tokenizer"
        )
