"""Hard signs, and group-wise lookup-free quantization (LFQ), the training of the bits.

The C channels of a token form g groups of d = C/g bits. The codebook of a group is all 2^d sign vectors, so
nothing is looked up; what is trained is that a token is sure of its code (low entropy per sample) while all
codes are used (high entropy of the codebook). B batch, h, w token grid.

Sources: lookup-free quantization is arXiv 2310.05737; in groups, `GFQ` in imagenet_gen/src/gfq.py of the code
published with the paper (arXiv 2602.14041), but the codebook's entropy is here that of all ranks' batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MAX_GROUP_BITS = 16  # the losses enumerate the codebook: 65,536 codes a group at most


def binarize(x: Tensor) -> Tensor:
    """+1 where x > 0, else -1 (so zero gives -1): float [...] -> the same shape and dtype.

    `torch.sign` would give a third value, 0.
    """
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks, whose gradient is the sum of all ranks' gradients (every rank's loss depends on every
    input).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)  # type: ignore[attr-defined]
        return total, None


def mean_over_ranks(x: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean of x, float [...], over the ranks of the group (None: all ranks), differentiable.

    x has one shape and dtype on all ranks, each of which must call this; the result keeps both. Without
    distribution it is x itself.

    Together with the usual averaging of gradients over ranks it gives the gradient that one rank would have
    had.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return _AllReduceSum.apply(x, process_group) / dist.get_world_size(process_group)


class LFQOutput(NamedTuple):
    """What quantizing x [B, C, h, w] gives. The losses are float32 scalars.

    bits: [B, C, h, w] of -1/+1, the gradient of which passes straight through to x.
    entropy_loss: per_sample_entropy - codebook_entropy, in nats per group.
    commitment: mean of (x - bits)^2.
    indices: [B, h*w, g] int64, the code of each group, bit j of the group worth 2^j.
    """

    bits: Tensor
    entropy_loss: Tensor
    commitment: Tensor
    per_sample_entropy: Tensor
    codebook_entropy: Tensor
    indices: Tensor


class GroupLFQ(nn.Module):
    """Quantizer without parameters. `channels` bits in `groups` contiguous groups (channel = group*d + j).

    `temperature` is that of the softmax over a group's codes. `eps` guards the logarithm of the mean
    probabilities. Raises ValueError where the groups do not divide the channels, or the codebook is too large
    to enumerate.
    """

    codes: Tensor
    place_values: Tensor

    def __init__(self, channels: int, groups: int, temperature: float = 0.01, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels in {groups} groups, expected a divisor of the channels")
        self.group_bits = channels // groups
        if self.group_bits > MAX_GROUP_BITS:
            raise ValueError(
                f"{channels} channels in {groups} groups make {self.group_bits} bits a group, "
                f"expected at most {MAX_GROUP_BITS} (the entropy enumerates all codes): use more groups"
            )
        self.channels, self.groups = channels, groups
        self.temperature, self.eps = temperature, eps
        place_values = 2 ** torch.arange(self.group_bits)
        set_bits = torch.arange(2**self.group_bits)[:, None] & place_values
        self.register_buffer("place_values", place_values, persistent=False)
        self.register_buffer("codes", torch.where(set_bits > 0, 1.0, -1.0), persistent=False)  # [2^d, d]

    def forward(self, x: Tensor, process_group: dist.ProcessGroup | None = None) -> LFQOutput:
        """x [B, C, h, w], the encoder's raw output in any float dtype -> bits in that dtype, and losses.

        ValueError on x of another shape.

        The codebook's entropy is that of the global batch: the mean over the ranks of `process_group` (None:
        all, where torch.distributed runs), each of which must hold the same number of positions. The
        per-sample entropy and the commitment are the rank's own; averaged over ranks they are those of the
        global batch.
        """
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"raw bits of shape {list(x.shape)}, expected [batch, {self.channels}, h, w]")
        bits = binarize(x.detach())
        batch = x.shape[0]
        with torch.autocast(device_type=x.device.type, enabled=False):
            raw = x.float()
            by_group = raw.reshape(batch, self.groups, self.group_bits, -1).permute(
                0, 3, 1, 2
            )  # [B, h*w, g, d]
            indices = ((by_group > 0) * self.place_values).sum(dim=-1)
            per_sample, codebook = self._entropies(by_group, process_group)
            commitment = (raw - bits.float()).square().mean()
        straight_through = bits + (x - x.detach())  # exactly -1/+1, as x + (bits - x) is not after rounding
        return LFQOutput(straight_through, per_sample - codebook, commitment, per_sample, codebook, indices)

    def _entropies(self, by_group: Tensor, process_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """[B, h*w, g, d] float32 -> the mean entropy of single groups, and the entropy of their mean."""
        logits = 2.0 * (by_group @ self.codes.T) / self.temperature  # [B, h*w, g, 2^d]
        probabilities = logits.softmax(dim=-1)
        per_sample = -(probabilities * (logits + self.eps).log_softmax(dim=-1)).sum(dim=-1).mean()
        usage = mean_over_ranks(probabilities.mean(dim=(0, 1, 2)), process_group)  # [2^d]
        codebook = -(usage * (usage + self.eps).log()).sum()
        return per_sample, codebook
