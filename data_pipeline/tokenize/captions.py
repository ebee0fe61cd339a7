"""Captions: cleaned, cut to a number of tokens, counted with the text tokenizer that training will use."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foundation.errors import RecipeError

# A caption must not be able to open or close parts of the training sequence.
# All marks around a name go at once, from the first of them on: nested ones cost one pass, not one each.
_SPECIAL = re.compile(r"(?<!<\|)(?:<\|)++([^|<>\s]{1,64})(?:\|>)++")
# What `models.layout.tokens` adds to a text tokenizer for the sequences of pictures.
_SEQUENCE_TOKEN = re.compile(r"<\|(res|query)_\d+\|>")
_CHARACTERS_PER_TOKEN = (
    64  # no real text has longer tokens; bounds the work on captions of a million characters
)


class CaptionCounter:
    """Cleans, cuts and counts captions.

    Args:
        tokenizer: a transformers fast tokenizer.
        max_tokens: longer captions are cut.
    """

    def __init__(self, tokenizer: Any, max_tokens: int):
        # Straight to the Rust tokenizer: what transformers does around it costs four times as much. A copy,
        # for it must cut and pad nothing, whatever its file says.
        self.encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.max_tokens = max_tokens

    def fit(self, caption: str) -> tuple[str, int]:
        """The cleaned caption, cut where it is too long, and its number of tokens without special ones.

        The count is that of the returned text, encoded anew, so a reader gets the same one.
        """
        text = clean_caption(caption[: self.max_tokens * _CHARACTERS_PER_TOKEN])
        limit = self.max_tokens
        while True:
            encoded = self.encoder.encode(text, add_special_tokens=False)
            count = len(encoded.ids)
            if count <= self.max_tokens:
                return text, count
            # A cut can change how the rest splits into tokens, even into more of them: cut shorter until it
            # fits.
            start, end = encoded.offsets[limit - 1]
            # A character of several tokens may end where the text does: then leave it out.
            text = text[: end if end < len(text) else start].rstrip()
            limit = max(1, limit - 1)


def clean_caption(caption: str) -> str:
    """Composed Unicode (NFC), single spaces, no control characters, no `<|special tokens|>`."""
    text = unicodedata.normalize("NFC", caption)
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)
    previous = None
    while previous != text:  # what is left of `<|a<|b|>c|>` after one pass is a spelling again
        previous, text = text, _SPECIAL.sub(r"\1", text)
    return " ".join(text.split())


def load_text_tokenizer_or_refuse(name: str) -> Any:
    """The text tokenizer of a folder or hub name; RecipeError where it cannot be loaded."""
    from models.text_tokens import load_text_tokenizer

    try:
        return load_text_tokenizer(name)
    except ValueError as error:
        raise RecipeError(f"text_tokenizer: {error}") from None


def train_and_save(captions: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on the cleaned captions and save it in `folder`."""
    from models.text_tokens import train_text_tokenizer

    tokenizer = train_text_tokenizer((clean_caption(text) for text in captions), vocab_size)
    tokenizer.save_pretrained(str(folder))


def text_tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) over what decides the tokens of a text: normalization, splitting, merges, and the ids of
    pieces and special tokens.

    The tokens of picture sequences, which no caption has, are left out: the tokenizer in a model has the hash
    of the one that the model was made with.
    """
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {key: serialized[key] for key in ("normalizer", "pre_tokenizer", "model")}
    added = ((token["id"], token["content"]) for token in serialized["added_tokens"])
    parts["added"] = [token for token in sorted(added) if not _SEQUENCE_TOKEN.fullmatch(token[1])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
