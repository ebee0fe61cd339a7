"""Who sees whom in a packed sequence. T packed tokens.

Source: the block-causal mask of the paper (arXiv 2602.14041; its table 14 compares it with a causal one),
`create_sparse_mask` in modeling/utils.py of the published code.
"""

import torch
from torch import Tensor


def attention_mask(document_ids: Tensor, block_ids: Tensor) -> Tensor:
    """bool [T, T], rows are queries, true = may attend: causal, full inside a block, never across documents.

    document_ids [T], block_ids [T] are int64; a block id of -1 marks a token that is causal only, any
    other is the unique number of a block of tokens that see each other. This is the definition; it takes T^2
    memory, and the attention backends, which do not, must agree with it.
    """
    places = torch.arange(len(document_ids), device=document_ids.device)
    same_document = document_ids[:, None] == document_ids[None, :]
    earlier = places[:, None] >= places[None, :]
    same_block = (block_ids[:, None] == block_ids[None, :]) & (block_ids[:, None] >= 0)
    return same_document & (earlier | same_block)
