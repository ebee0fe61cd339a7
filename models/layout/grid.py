"""Token grids: patch raster order, 2D positions, and the picture sizes of the published models.

h, w token grid (rows, columns), p patch side in tokens, P = p*p tokens of a patch, D width of the backbone.

Sources: order and positions are those of `get_2d_embed` in modeling/mllm.py of the code published with the
paper (arXiv 2602.14041); the sine-cosine table is that of arXiv 1706.03762, with half of the width an axis.
"""

from functools import lru_cache

import torch
from torch import Tensor

from models.checks import is_count

MAX_SIDE = 256
"""Longest side of a grid, in tokens: the text tokenizer gets `<|res_1|>` to `<|res_256|>`."""

_LANDSCAPE_SIZES = {
    1024: ((512, 2048), (512, 1920), (640, 1536), (768, 1280), (896, 1152), (1024, 1024)),
    512: ((256, 1024), (256, 896), (384, 640), (512, 512)),
}

PUBLISHED_SIZES: dict[int, tuple[tuple[int, int], ...]] = {
    resolution: tuple(sorted({*sizes, *((width, height) for height, width in sizes)}))
    for resolution, sizes in _LANDSCAPE_SIZES.items()
}
"""Resolution class -> the (height, width) in pixels that the published models were trained at.

Every side is a multiple of 128, so that both 4x4 and 8x8 patches of 16-pixel tokens fit."""


def check_grid(h: int, w: int, p: int) -> None:
    """Raise ValueError unless p x p patches tile an h x w token grid that the `<|res_k|>` tokens can name."""
    if not (is_count(h) and is_count(w) and is_count(p)):
        raise ValueError(
            f"a grid of {h!r}x{w!r} tokens in patches of side {p!r}: expected whole numbers of at least 1"
        )
    if h % p or w % p:
        raise ValueError(
            f"a grid of {h}x{w} tokens can't be cut into {p}x{p} patches: "
            f"choose a picture size whose sides, in tokens, are multiples of {p}"
        )
    if max(h, w) > MAX_SIDE:
        raise ValueError(f"a grid of {h}x{w} tokens is too large: a side has at most {MAX_SIDE} tokens")


def tiles_published_size(side: int) -> bool:
    """Whether squares (patches) of `side` pixels a side tile any picture of `PUBLISHED_SIZES`."""
    sizes = (size for of_class in PUBLISHED_SIZES.values() for size in of_class)
    return any(height % side == 0 and width % side == 0 for height, width in sizes)


@lru_cache(maxsize=256)
def _patch_raster(h: int, w: int, p: int) -> Tensor:
    """Plain raster indices [h*w] int64 of the tokens in patch raster order: (h p1) (w p2) -> (h w p1 p2)."""
    check_grid(h, w, p)
    # Cached: a caller in inference mode, or under another default device, must not leave a tensor of those.
    with torch.inference_mode(False), torch.device("cpu"):
        plain = torch.arange(h * w).view(h // p, p, w // p, p)
        return plain.transpose(1, 2).reshape(-1)


def to_patch_raster(x: Tensor, h: int, w: int, p: int, dim: int = 0) -> Tensor:
    """x [..., h*w, ...] of any dtype, whose dimension `dim` is reordered from plain raster to patch raster.

    Patches stand in raster order, and tokens in raster order inside their patch: (h p1) (w p2) ->
    (h w p1 p2). Shape, dtype and device stay. ValueError where p x p patches do not tile the grid.
    """
    return x.index_select(dim, _patch_raster(h, w, p).to(x.device))


def from_patch_raster(x: Tensor, h: int, w: int, p: int, dim: int = 0) -> Tensor:
    """The inverse of `to_patch_raster`: x [..., h*w, ...] of any dtype, in patch raster -> plain raster."""
    return x.index_select(dim, _patch_raster(h, w, p).argsort().to(x.device))


def grid_places(h: int, w: int, p: int) -> tuple[Tensor, Tensor]:
    """(rows [h*w], columns [h*w]) int64 of the tokens of a grid in patch raster order, on the CPU.

    ValueError where p x p patches do not tile the grid.
    """
    index = _patch_raster(h, w, p)
    return index // w, index % w


@lru_cache(maxsize=16)
def _axis_table(half: int, device: torch.device) -> Tensor:
    """float32 [MAX_SIDE, half]: e(k) = [sin(k*omega), cos(k*omega)], omega_i = 10000^(-i / (half/2))."""
    with torch.inference_mode(False), torch.device("cpu"):
        # In float32 all through, on the CPU, as the published table was computed: its rounding is part of it.
        omega = 1.0 / 10000.0 ** (torch.arange(half // 2, dtype=torch.float32) / (half / 2.0))
        angles = torch.arange(MAX_SIDE, dtype=torch.float32)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(device)


def position_embedding(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """float32 [n, width] for tokens at rows [n], cols [n] (int64, below MAX_SIDE): [e(col), e(row)].

    e(k) = [sin(k*omega), cos(k*omega)], omega_i = 10000^(-i / (width/4)), so values lie in [-1, 1].
    Added to the projected vision embeddings, and to the hidden states that enter the head, there with the
    position of the token that each of them predicts.
    ValueError where the width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2D positions need a width that is a multiple of 4, found {width}")
    table = _axis_table(width // 2, rows.device)
    return torch.cat([table[cols], table[rows]], dim=-1)


def positions_2d(h: int, w: int, width: int, p: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [h*w, width]: the 2D positions of a whole grid in patch raster order.

    ValueError where p x p patches do not tile the grid, or the width is no multiple of 4.
    """
    rows, cols = grid_places(h, w, p)
    return position_embedding(rows.to(device), cols.to(device), width)
