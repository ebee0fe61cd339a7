"""The class-conditional model: a transformer over binary tokens, and a diffusion head.

Shapes: B images, C bits per token, h, w token grid, P tokens per step, M = h*w/P steps, D width, T positions.
Parameter names are those of the published weights. Activations have the weights' dtype, or autocast's.

Source: the paper, arXiv 2602.14041; imagenet_gen/src/model_parallel.py of the published code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.class_conditional.config import ClassConditionalConfig
from models.class_conditional.layers import (
    INITIAL_STD,
    Attend,
    Layer,
    NormalEmbedding,
    SwiGLU,
)
from models.class_conditional.order import rotations, sequence_attention, to_sequence_order
from models.head import DiffusionHead
from models.layout import flip_bits

LABEL_DROP = 0.1
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


class ClassConditionalModel(nn.Module):
    """Predicts the binary tokens of an image, P at a time, from its class.

    `forward` is the training loss; `models.class_conditional.sample` draws images.
    """

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        self.config = config
        width = config.dim
        self.cls_embedding = NormalEmbedding(config.num_classes + 1, config.cls_token_num * width)
        if config.parallel_num > 1:
            self.query_token = nn.Parameter(torch.randn(1, config.parallel_num - 1, width) * INITIAL_STD)
        self.proj_in = SwiGLU(config.latent_dim, int(1.5 * width), width, bias=True)
        self.emb_norm = nn.RMSNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.pos_for_diff = NormalEmbedding(config.tokens, width)
        self.head = DiffusionHead(config.head)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of the activations outside autocast."""
        return self.pos_for_diff.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.pos_for_diff.weight.device

    def forward(self, bits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Loss of every token, unreduced.

        Args:
            bits: -1/+1, `[B, C, h, w]` in plain raster order, any dtype.
            labels: int64 `[B]`, 0 to num_classes (that one is the null class).
            generator: where the draws come from; the global one of the bits' device if None.

        Draws, in this order: in training mode two uniform `[B, h*w, C]` for the flips, then one `[B]` for the
        label drop; in either mode the head's t and noise.

        Returns float32 `[B, M, P]`: the mean over bits and over `diff_batch_mul` draws.
        Raises ValueError on bits of another shape, or labels that the model does not know.
        """
        self._check_bits(bits)
        labels = self.check_labels(labels)
        clean = to_sequence_order(bits.float(), self.config)  # [B, h*w, C]
        fed = clean
        if self.training:
            fed = flip_bits(clean, self._draw_flips(clean, generator))
            labels = self._drop_labels(labels, generator)
        hidden = self.hidden_states(labels, fed)  # [B, h*w, D]
        targets, conditions = (x.reshape(-1, self.config.parallel_num, x.shape[-1]) for x in (clean, hidden))
        loss = self.head.loss(targets, conditions, generator=generator)  # [B*M, P]
        return loss.view(bits.shape[0], self.config.steps, self.config.parallel_num)

    def hidden_states(self, labels: Tensor, bits: Tensor) -> Tensor:
        """Condition of the head for every token, teacher-forced.

        Args: labels int64 `[B]`, 0 to num_classes; bits `[B, h*w, C]` of -1/+1, any float dtype, in sequence
            order. Returns `[B, h*w, D]` in the dtype of the weights.
        """
        fed = bits[:, : self.config.tokens - self.config.parallel_num]  # the last patch predicts nothing
        x = torch.cat([self.embed_prefix(labels), self.embed_bits(fed)], dim=1)
        attend = sequence_attention(self.config, self.config.sequence, x.device)
        x = self.run_layers(x, rotations(self.config, x.device), [attend] * self.config.n_layer)
        return self.condition(x[:, -self.config.tokens :], 0)

    def embed_prefix(self, labels: Tensor) -> Tensor:
        """Class tokens and query tokens, normalized.

        labels: int64 `[B]`, 0 to num_classes -> `[B, cls_token_num + P - 1, D]`.
        """
        x = self.cls_embedding(labels).unflatten(-1, (self.config.cls_token_num, self.config.dim))
        if self.config.parallel_num > 1:
            x = torch.cat([x, self.query_token.expand(x.shape[0], -1, -1)], dim=1)
        return self.emb_norm(x)

    def embed_bits(self, bits: Tensor) -> Tensor:
        """Bits of -1/+1, `[B, T, C]` of any float dtype -> `[B, T, D]`, normalized."""
        return self.emb_norm(self.proj_in(bits.to(self.dtype)))

    def run_layers(self, x: Tensor, rotations: Tensor, attends: Sequence[Attend]) -> Tensor:
        """float `[B, T, D]` -> `[B, T, D]`, before the final norm.

        rotations: complex64 `[T, 1, e/2]`, e the width of an attention head; one `Attend` per layer.
        """
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, rotations, attend)
        return x

    def condition(self, x: Tensor, first: int) -> Tensor:
        """Final norm, plus the place of the token that each position predicts, counted from `first`.

        x float `[B, T, D]` -> `[B, T, D]`; first + T is at most h*w.
        """
        places = torch.arange(first, first + x.shape[1], device=x.device)
        return self.norm(x) + self.pos_for_diff(places)

    def check_labels(self, labels: Tensor | Sequence[int]) -> Tensor:
        """Labels, a list or a tensor `[B]` of any integer dtype, as int64 `[B]` on the model's device.

        Raises ValueError on anything but class numbers that it knows. The null class (`num_classes`), which
        stands for no label, is one of them.
        """
        null, expected = self.config.num_classes, "expected a non-empty list of class numbers"
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"labels: found {labels!r}, {expected}") from error
        if labels.ndim != 1 or not labels.numel() or labels.dtype not in INTEGERS:
            raise ValueError(f"labels: found {labels.dtype} of shape {list(labels.shape)}, {expected}")
        wrong = sorted({int(label) for label in labels.tolist() if not 0 <= label <= null})
        if wrong:
            raise ValueError(
                f"labels: found {wrong[:8]}, which this model does not know; expected 0 to {null - 1}, or "
                f"{null} for no class"
            )
        return labels.to(self.device, torch.int64)

    def _check_bits(self, bits: Tensor) -> None:
        c = self.config
        if not isinstance(bits, Tensor):
            raise ValueError(f"bits: found a {type(bits).__name__}, expected a tensor of -1/+1")
        if bits.ndim != 4 or tuple(bits.shape[1:]) != (c.latent_dim, c.grid, c.grid):
            raise ValueError(
                f"bits: found shape {list(bits.shape)}, expected [B, {c.latent_dim}, {c.grid}, {c.grid}] "
                f"({c.resolution} px, {c.down_size} px per token)"
            )

    def _draw_flips(self, bits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Each bit flips with a probability of its own, perturb_rate * u, u ~ U(0, 1): bool like bits."""
        source = bits.device if generator is None else generator.device
        draw = torch.rand(bits.shape, generator=generator, device=source)
        limit = torch.rand(bits.shape, generator=generator, device=source)
        return (draw < self.config.perturb_rate * limit).to(bits.device)

    def _drop_labels(self, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        source = labels.device if generator is None else generator.device
        dropped = torch.rand(labels.shape, generator=generator, device=source) < LABEL_DROP
        return labels.masked_fill(dropped.to(labels.device), self.config.num_classes)
