"""Attention of packed sequences and of decode steps, behind one function.

A plan is made once per forward and used by all layers: `plan(q, k, v)` with q [B, H, Q, E], k and v
[B, G, K, E] of G <= H key-value heads (H a multiple of G), gives [B, H, Q, E]. All plans agree with
`models.layout.attention_mask`:

    flex       compiled FlexAttention over blocks of the mask; T^2 bits once a forward, to see which blocks
               are empty, and none in the attention itself. The choice on a GPU.
    documents  scaled_dot_product_attention, one call with one small mask per document. The choice on a CPU.
    dense      one call with the whole [T, T] mask: the reference.
    decode     no mask at all: P tokens that see the cache and each other; flash-attn where it is installed.

q, k and v have one float dtype, which the result keeps. E is the width of a head; scores are scaled by
1/sqrt(E). Sources: the mask is the paper's (arXiv 2602.14041), shared key-value heads are arXiv 2305.13245,
FlexAttention is arXiv 2412.05496, flash-attn arXiv 2307.08691.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.layout import attention_mask

Backend = Literal["flex", "documents", "dense"]


class AttentionPlan(Protocol):
    """q [B, H, Q, E], k and v [B, G, K, E] -> [B, H, Q, E], of one float dtype; it knows who sees whom."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def default_backend(device_type: str) -> Backend:
    """The backend of packed sequences on a kind of device."""
    return "flex" if device_type == "cuda" else "documents"


def describe_attention(device_type: str) -> str:
    """What will attend on a kind of device, for the line that a run begins with."""
    if device_type != "cuda":
        return f"attention {default_backend(device_type)}"
    decode = "flash-attn" if _flash_attn() else "torch (flash-attn is not installed)"
    return f"attention {default_backend(device_type)}, without a mask {decode}"


def plan_packed(document_ids: Tensor, block_ids: Tensor, backend: Backend | None = None) -> AttentionPlan:
    """The plan of one packed sequence (B = 1, Q = K = T) laid out as document_ids [T], block_ids [T] say.

    Both are int64, with a block id of -1 where a token is causal only (see `models.layout.attention_mask`).
    Documents stand one after the other, as `models.layout.pack` puts them. ValueError on an unknown backend.
    """
    backend = backend or default_backend(document_ids.device.type)
    if backend == "flex":
        return partial(_flex, flex_mask(document_ids, block_ids))
    if backend == "documents":
        lengths = torch.unique_consecutive(document_ids, return_counts=True)[1].tolist()
        parts = zip(document_ids.split(lengths), block_ids.split(lengths), strict=True)
        return partial(_documents, lengths, [attention_mask(*part) for part in parts])
    if backend == "dense":
        return partial(_masked, attention_mask(document_ids, block_ids))
    raise ValueError(f"attention backend {backend!r}: expected one of {', '.join(get_args(Backend))}")


def _masked(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _documents(lengths: list[int], masks: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(masks, *(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_masked(*part) for part in parts], dim=2)


def flex_mask(document_ids: Tensor, block_ids: Tensor) -> BlockMask:
    """The mask in the form that FlexAttention takes: a rule, and which 128x128 blocks it leaves empty.

    document_ids [T], block_ids [T] int64 as in `plan_packed`; the mask is one of [T, T] for all heads.
    """

    def allowed(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_block = (block_ids[query] == block_ids[key]) & (block_ids[query] >= 0)
        return (document_ids[query] == document_ids[key]) & ((query >= key) | same_block)

    length = len(document_ids)
    return create_block_mask(allowed, None, None, length, length, device=str(document_ids.device))


@cache
def _flex_kernel(on_gpu: bool) -> Callable[..., Any]:
    # Without a GPU the compiled kernel has no backward; the plain one is slow, and there for the tests.
    kernel: Any = flex_attention
    return torch.compile(kernel) if on_gpu else kernel


def _flex(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flex_kernel(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=True)


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's function where the package is installed, else None."""
    found = importlib.util.find_spec("flash_attn") is not None
    return importlib.import_module("flash_attn").flash_attn_func if found else None


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask, every query to every key.

    q [B, H, Q, E], k and v [B, G, K, E] -> [B, H, Q, E], of one float dtype. flash-attn computes it in
    bfloat16 and float16 on a GPU.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and (flash := _flash_attn()):
        return flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    # With no mask the queries of all heads that share a key head may stand in one row: no keys are repeated.
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
