"""The binary tokenizer: pictures to bits, bits to pictures, and the quantizer that trains it."""

from models.tokenizer.config import TOKENIZER_PRESETS, TokenizerConfig, TokenizerPreset
from models.tokenizer.files import (
    load_tokenizer,
    read_tokenizer_config,
    save_tokenizer,
    tokenizer_fingerprint,
    tokenizer_from_state,
)
from models.tokenizer.network import BinaryTokenizer, to_uint8
from models.tokenizer.quantization import GroupLFQ, LFQOutput, binarize, mean_over_ranks

__all__ = [
    "TOKENIZER_PRESETS",
    "BinaryTokenizer",
    "GroupLFQ",
    "LFQOutput",
    "TokenizerConfig",
    "TokenizerPreset",
    "binarize",
    "load_tokenizer",
    "mean_over_ranks",
    "read_tokenizer_config",
    "save_tokenizer",
    "to_uint8",
    "tokenizer_fingerprint",
    "tokenizer_from_state",
]
