"""Sampling without what makes ours fast: the other side of `benchmarks/sampling.py --baseline`.

The straightforward way to write the published pipeline down, on the same weights and with the same draws, so
that a seed gives the same bits:

- each pass of the head is its whole net, on both guidance halves: the tokens, which the halves share, are
  projected for each, the condition is projected again, and the time embedded again, for every row;
- keys and values grow by concatenation at every step;
- text-to-image: the two halves go through the backbone one after the other, in batches of `num_images` rows,
  by transformers' own Qwen3 with its own cache and attention; every picture's row reads the prompt;
- class-conditional: both halves are one batch, and every row reads its class tokens;
- weights as they are, none laid out anew.

Nothing is slower than that needs: no logits are computed, nothing after the last patch, nothing in float64,
and the layers are ours, with their fused operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from models.backbone.qwen3 import ATTENTION
from models.class_conditional import ClassConditionalModel, guidance_at
from models.class_conditional.layers import Attend
from models.class_conditional.order import from_sequence_order, rotations, sequence_attention
from models.head import DiffusionHead
from models.layout import SequenceTokens, positions_2d
from models.text_to_image import TextToImageModel
from models.tokenizer import binarize


def plain_patch(head: DiffusionHead, condition: Tensor, guidance: float, steps: int) -> Tensor:
    """What `DiffusionHead.sample` draws, Euler-Maruyama without time shift: `[N, P, D]` -> `[N, P, C]`."""
    rows, halves = condition.shape[0], 2 if guidance > 1.0 else 1
    shape = (rows // halves, head.config.parallel_num, head.config.ch_target)
    device = condition.device
    inverse = 1.0 / torch.linspace(0.0, 0.95, steps + 1) - 1.0
    times = (1.0 / (1.0 + inverse)).tolist()
    dts = (1.0 / (1.0 + inverse)).diff().tolist()

    def velocity(x: Tensor, t: float) -> Tensor:
        both = x.repeat(halves, 1, 1)
        predicted = head.net(both, torch.full((rows,), t, device=device), condition).float()
        v = (predicted - both) / max(1.0 - t, 0.05)
        if halves == 1:
            return v
        conditional, unconditional = v.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    x = torch.randn(shape, device=device)
    for t, dt in zip(times, dts, strict=False):
        v = velocity(x, t)
        score = (t * v - x) / ((1.0 - t) ** 2 + t * (1.0 - t))
        noise = torch.randn(shape, device=device)
        x = x + (v + (1.0 - t) * score) * dt + math.sqrt(2.0 * (1.0 - t) * dt) * noise
    x = x + velocity(x, 0.95) * 0.05
    return x.repeat(halves, 1, 1)


class _Half:
    """The rows of one guidance half in transformers' Qwen3, with a cache that grows."""

    def __init__(self, model: TextToImageModel, rows: int) -> None:
        self.llm, self.rows, self.cache, self.seen = model.llm, rows, DynamicCache(), 0

    def read(self, embeddings: Tensor, causal: bool) -> Tensor:
        """Hidden states `[rows, T, D]` of `[T or rows, T, D]` more; not causal: they all see one another."""
        x = embeddings.expand(self.rows, -1, -1)
        new = x.shape[1]
        self.seen += new
        mask = torch.ones(new, self.seen, dtype=torch.bool, device=x.device)
        mask = mask.tril(self.seen - new) if causal else mask
        return self.llm.model(
            inputs_embeds=x,
            attention_mask={"full_attention": mask[None, None]},
            position_ids=torch.arange(self.seen - new, self.seen, device=x.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


@torch.inference_mode()
def plain_text_to_image(
    model: TextToImageModel,
    prompts: Sequence[Sequence[int]],
    grid: tuple[int, int],
    tokens: SequenceTokens,
    num_images: int,
    guidance: float,
    steps: int,
) -> Tensor:
    """What `TextToImageModel.generate` draws, on torch's own generator: `[n, h*w, C]`."""
    P, llm = model.config.head.parallel_num, model.llm
    table = positions_2d(*grid, model.config.llm.hidden_size, model.config.p, llm.device).split(P)
    llm.set_attn_implementation("sdpa")
    halves, hidden, patches = [_Half(model, num_images) for _ in prompts], [], []
    for half, prompt in zip(halves, prompts, strict=True):
        ids = torch.tensor([*prompt, *tokens.picture_start(*grid)], device=llm.device)
        embeddings = llm.get_input_embeddings()(ids)[None]
        half.read(embeddings[:, :-P], causal=True)
        hidden.append(half.read(embeddings[:, -P:], causal=False))
    for step, positions in enumerate(table):
        if step:
            embeddings = (model.projector(patches[-1].to(llm.dtype)) + table[step - 1]).to(llm.dtype)
            hidden = [half.read(embeddings, causal=False) for half in halves]
        condition = (torch.cat(hidden) + positions).to(llm.dtype)
        patches.append(binarize(plain_patch(model.vision_head, condition, guidance, steps)[:num_images]))
    llm.set_attn_implementation(ATTENTION)
    return torch.cat(patches, dim=1)


@torch.inference_mode()
def plain_class_conditional(
    model: ClassConditionalModel, labels: Tensor, guidance: float, steps: int
) -> Tensor:
    """What `models.class_conditional.sample` draws, linear guidance > 1: `[B]` -> `[B, C, h, w]`."""
    config, P, images = model.config, model.config.parallel_num, len(labels)
    labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    turns, keys_values = rotations(config, labels.device), [None] * config.n_layer

    def run(x: Tensor, attend: Attend, start: int) -> Tensor:
        growing = [_growing(keys_values, layer, attend) for layer in range(config.n_layer)]
        return model.run_layers(x, turns[start : start + x.shape[1]], growing)

    x, patches = model.embed_prefix(labels), []
    prefix = x.shape[1]
    x = run(x, sequence_attention(config, prefix, labels.device), 0)[:, -P:]
    for step in range(config.steps):
        scale = guidance_at(step, config.steps, guidance, "linear")
        bits = binarize(plain_patch(model.head, model.condition(x, step * P), scale, steps))
        patches.append(bits[:images])
        if step + 1 < config.steps:
            x = run(model.embed_bits(bits), F.scaled_dot_product_attention, prefix + step * P)
    return from_sequence_order(torch.cat(patches, dim=1), config)


def _growing(keys_values: list[tuple[Tensor, Tensor] | None], layer: int, attend: Attend) -> Attend:
    """`attend` to what the layer has seen, which it appends to."""

    def append_and_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (seen := keys_values[layer]) is not None:
            k, v = torch.cat([seen[0], k], dim=2), torch.cat([seen[1], v], dim=2)
        keys_values[layer] = k, v
        return attend(q, k, v)

    return append_and_attend
