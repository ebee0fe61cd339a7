"""From bits to the backbone's width. C bits per token, D width.

Source: `MLPconnector` in modeling/utils.py of the code published with the paper (arXiv 2602.14041); GELU is
arXiv 1606.08415.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """`fc2(gelu(fc1(bits)))` with the tanh approximation of GELU: float [..., C] -> [..., D]."""

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(bits, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, bits: Tensor) -> Tensor:
        """Bits of -1/+1, [..., C] in the weights' float dtype -> embeddings [..., D] in the same."""
        return self.fc2(F.gelu(self.fc1(bits), approximate="tanh"))
