"""From bits to the backbone's width."""

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """`fc2(gelu(fc1(bits)))` with the tanh approximation of GELU: [..., C] -> [..., D]."""

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(bits, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, bits: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(bits), approximate="tanh"))
