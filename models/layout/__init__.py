"""The order that tokens stand in, where they stand, and who sees whom. No network, no weights.

grid.py      patch raster, 2D positions, the published picture sizes
tokens.py    the special tokens of a sequence, added to and looked up in a text tokenizer
masks.py     the block-causal mask, as a definition that every attention backend must agree with
documents.py one training sample -> one document; bit flips
packing.py   several documents -> one packed sequence of tensors
"""

from models.layout.documents import (
    Sample,
    Task,
    document_length,
    document_targets,
    draw_flips,
    flip_bits,
)
from models.layout.grid import (
    MAX_SIDE,
    PUBLISHED_SIZES,
    check_grid,
    from_patch_raster,
    grid_places,
    position_embedding,
    positions_2d,
    tiles_published_size,
    to_patch_raster,
)
from models.layout.masks import attention_mask
from models.layout.packing import PackedBatch, pack
from models.layout.tokens import (
    SequenceTokens,
    TemplateLengths,
    add_sequence_tokens,
    encode_prompt,
    plain_ids,
    sequence_tokens,
)

__all__ = [
    "MAX_SIDE",
    "PUBLISHED_SIZES",
    "PackedBatch",
    "Sample",
    "SequenceTokens",
    "Task",
    "TemplateLengths",
    "add_sequence_tokens",
    "attention_mask",
    "check_grid",
    "document_length",
    "document_targets",
    "draw_flips",
    "encode_prompt",
    "flip_bits",
    "from_patch_raster",
    "grid_places",
    "pack",
    "plain_ids",
    "position_embedding",
    "positions_2d",
    "sequence_tokens",
    "tiles_published_size",
    "to_patch_raster",
]
