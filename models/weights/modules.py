"""Modules without memory for their weights, and the weights that then stream into them.

No arithmetic: names and shapes are those of the weights published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def build_filled(
    make: Callable[[], M],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> M:
    """The module that ``make`` builds, with copies of ``tensors`` as its parameters.

    Its buffers, and parameters that are tied to others, are left for the caller to move and to tie.

    Args:
        make: builds the module; its random weights are never held in memory.
        tensors: (name, tensor) for every parameter, of its shape [...] and any float dtype, checked before; a
            tensor may be reused after its turn.
        dtype: of the parameters; None keeps that of each tensor.
        device: where the parameters go.
    """
    # Buffers (RoPE frequencies) are computed by the module and in no file: they need memory from the start.
    with init_empty_weights(include_buffers=False):
        module = make()
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device).copy_(tensor)
        module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
    return module
