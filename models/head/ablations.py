"""What the paper compares the diffusion head with (table 13): independent bits, one class per token.

Both are one linear layer on the hidden state of each token, trained with cross-entropy. Same interface as
`DiffusionHead`: `loss(target, cond)` and `sample(cond)`.
Shapes: N groups of tokens, P tokens per group, C bits per token, D width of the condition.
Source: the paper, arXiv 2602.14041, table 13.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.head.layers import XavierLinear

# 2^31 parameters are 8.6 GB in float32, and four times that with gradients and Adam's moments.
MAX_TOKEN_CLASSES_PARAMETERS = 2**31
MAX_DRAWN_CLASSES = 2**24  # of torch.multinomial


def draw_class(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One class, 0 to K - 1, per row of logits `[.., K]` of any float dtype -> int64 `[..]`."""
    probabilities = logits.float().softmax(dim=-1).flatten(0, -2)
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])


class BitwiseHead(nn.Module):
    """Every bit is its own two-class problem, `Linear(D -> 2C)`: blind to how bits depend on one another."""

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.bits = bits
        self.linear = XavierLinear(width, 2 * bits)

    def logits(self, cond: Tensor) -> Tensor:
        """Logits of -1, then of +1: `[N, P, D]` -> `[N, P, C, 2]`, in the float dtype of the weights."""
        return self.linear(cond).unflatten(-1, (self.bits, 2))

    def loss(self, target: Tensor, cond: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over bits.

        target -1/+1 `[N, P, C]`, cond `[N, P, D]` in the weights' dtype -> float32 `[N, P]`, at least 0.
        """
        logits = self.logits(cond).float()
        per_bit = F.cross_entropy(logits.flatten(0, -2), (target > 0).long().flatten(), reduction="none")
        return per_bit.view(target.shape).mean(dim=-1)

    @torch.inference_mode()
    def sample(self, cond: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws of all bits: `[N, P, D]` in the weights' dtype -> -1/+1 float32 `[N, P, C]`.

        The generator is of cond's device; None takes torch's global one.
        """
        return 2.0 * draw_class(self.logits(cond), generator).float() - 1.0


class TokenHead(nn.Module):
    """One class per token, `Linear(D -> 2^C)`: exact within a token, but its size doubles with every bit."""

    def __init__(self, bits: int, width: int) -> None:
        """Raises ValueError beyond 2^31 parameters (C = 32, D = 1024: 4.4e12), or 2^24 classes."""
        super().__init__()
        parameters = (width + 1) * 2**bits
        if parameters > MAX_TOKEN_CLASSES_PARAMETERS:
            raise ValueError(
                f"token classification of {bits} bits at width {width} needs {parameters:.2g} parameters "
                f"({width + 1} x 2^{bits}); expected at most {MAX_TOKEN_CLASSES_PARAMETERS:.2g}: "
                "use the diffusion head, or a tokenizer of fewer bits"
            )
        if 2**bits > MAX_DRAWN_CLASSES:
            raise ValueError(
                f"token classification of {bits} bits has {2**bits:,} classes ({parameters:,} parameters at "
                f"width {width}); expected at most {MAX_DRAWN_CLASSES:,}, as torch.multinomial draws from "
                "no more: use the diffusion head, or a tokenizer of fewer bits"
            )
        self.bits = bits
        self.linear = XavierLinear(width, 2**bits)

    def loss(self, target: Tensor, cond: Tensor) -> Tensor:
        """Cross-entropy in nats of a token's class.

        target -1/+1 `[N, P, C]`, cond `[N, P, D]` in the weights' dtype -> float32 `[N, P]`, at least 0.
        The class of a token is sum_j bit_j 2^j over its bits as 0/1.
        """
        places = 2 ** torch.arange(self.bits, device=target.device)
        classes = ((target > 0).long() * places).sum(dim=-1)
        logits = self.linear(cond).float()
        return F.cross_entropy(logits.flatten(0, -2), classes.flatten(), reduction="none").view(classes.shape)

    @torch.inference_mode()
    def sample(self, cond: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One class drawn per token: `[N, P, D]` in the weights' dtype -> -1/+1 float32 `[N, P, C]`.

        The generator is of cond's device; None takes torch's global one.
        """
        classes = draw_class(self.linear(cond), generator)
        bits = (classes[..., None] >> torch.arange(self.bits, device=cond.device)) & 1
        return 2.0 * bits.float() - 1.0
