"""The floor of a benchmark holds every matrix product of what it is the floor of, and nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.matrix_products import MatrixProducts
from models.packed_linear import packed_linears


class Block(nn.Module):
    """A linear layer, a product of activations, a convolution, and much that is no product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 16), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(F.silu(self.linear(x)), (16,))
        scores = (x @ x.transpose(-1, -2)).softmax(-1)
        return self.conv(scores[None, None]).mean()


def recorded(model: nn.Module, x: Tensor) -> MatrixProducts:
    with torch.inference_mode(), MatrixProducts(model) as products:
        model(x)
    return products


def test_every_product_is_counted_once() -> None:
    products = recorded(Block(), torch.randn(32, 8))
    linear, scores, conv = 2 * 32 * 8 * 16, 2 * 32 * 32 * 16, 2 * 32 * 32 * 4 * 9
    assert products.flops == linear + scores + conv
    assert len(products.calls) == 3
    assert products.replay() > 0


def test_products_of_packed_weights_are_the_same_products() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(48, 64)
    plain = recorded(model, x)
    with packed_linears([model], rows=48):
        packed = recorded(model, x)
    assert packed.flops == plain.flops == 2 * 48 * 64 * (64 + 32)
    assert len(packed.calls) == len(plain.calls) == 2
