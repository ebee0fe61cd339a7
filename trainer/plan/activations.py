"""The peak of a forward and backward pass over one pack, by running the real model on tensors without data.

T packed tokens, D width, C bits per token, P tokens of a patch, N patches predicted, L text targets. The
model's own code runs as in training, activation checkpointing included, with two small numbers of layers: the
peak is linear in them. Only attention is replaced, by what a fused kernel (FlexAttention) keeps of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.backbone import Backend, run_backbone
from models.exchange import exchanged
from models.layout import PackedBatch, position_embedding
from models.text_to_image import TextToImageConfig, TextToImageModel
from trainer.adapters import add_adapters
from trainer.model_recipe import LoraSection
from trainer.plan.live_bytes import LiveBytes

FEW, MORE = 2, 3
"""Numbers of layers that are run: beyond the second, each adds the same."""


@dataclass(frozen=True)
class PackShape:
    """What of a pack decides memory.

    Attributes:
        tokens: T.
        vision_targets: N*P; as many vision tokens are fed, or a few less.
        text_targets: L.
    """

    tokens: int
    vision_targets: int
    text_targets: int


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes beyond the states at the peak of a forward and backward pass.

    Attributes:
        per_layer: what each layer of the backbone keeps for the backward pass.
        layers: number of layers.
        under_way: all else at the peak: a layer computed again, the head or the logits; a weight's gradient.
        head: peak of the diffusion head alone, forward and backward.
        logits: peak of logits and text loss alone, forward and backward.
    """

    per_layer: int
    layers: int
    under_way: int
    head: int
    logits: int

    @property
    def peak(self) -> int:
        return self.per_layer * self.layers + self.under_way


def activation_bytes(
    config: TextToImageConfig,
    packs: Sequence[PackShape],
    dtype: torch.dtype,
    checkpointing: bool,
    lora: LoraSection | None = None,
) -> ActivationBytes:
    """Bytes that a pack needs beyond weights, optimizer and gradients that are summed up.

    Args:
        config: sizes of the model, of which nothing is allocated.
        packs: the pack that needs most is among them; the first is the longest.
        dtype: of the weights that are computed with.
        checkpointing: whether layers are computed again in the backward pass.
        lora: adapters, under which the backbone needs no gradients of weights.
    """
    # Positions come from a cached table, in which a tensor without data must not stay: it is made before.
    position_embedding(
        torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), config.llm.hidden_size
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _build(config, FEW, dtype, checkpointing, lora)
        small = [peak_bytes(model, blank_batch(config, pack)) for pack in dict.fromkeys(packs)]
        longest = packs[0]
        model.given = torch.empty(longest.tokens, config.llm.hidden_size, dtype=dtype, requires_grad=True)
        head = peak_bytes(model, blank_batch(config, dataclasses.replace(longest, text_targets=0)))
        logits = peak_bytes(model, blank_batch(config, dataclasses.replace(longest, vision_targets=0)))
        large = peak_bytes(_build(config, MORE, dtype, checkpointing, lora), blank_batch(config, longest))
    per_layer = (large - small[0]) // (MORE - FEW)
    return ActivationBytes(
        per_layer, config.llm.num_hidden_layers, max(small) - FEW * per_layer, head, logits
    )


def peak_bytes(model: TextToImageModel, batch: PackedBatch) -> int:
    """The most bytes that a forward and backward pass holds at a time beyond the model and the batch.

    Gradients of weights are dropped as soon as they are whole, as under ZeRO, where they are reduced then.
    """

    def drop(weight: Tensor) -> None:
        weight.grad = None

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in trained]
    counter = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers(), *vars(batch).values()]:
        if isinstance(tensor, Tensor):
            counter.ignore(tensor)
    with counter:
        losses = model(batch)
        (losses.vision.sum() + losses.text.sum()).backward()
    for hook in hooks:
        hook.remove()
    return counter.peak


class FusedAttentionModel(TextToImageModel):
    """The model with attention as a fused kernel sees it: no mask, nothing of size T^2.

    `given`, where it is set, stands for what the backbone would compute.
    """

    given: Tensor | None = None

    def hidden_states(self, batch: PackedBatch, backend: Backend | None = None) -> Tensor:
        if self.given is not None:
            return self.given
        embeddings = self.llm.get_input_embeddings()(batch.input_ids)
        bits = batch.vision_bits.to(embeddings.dtype)
        vision = self.embed_bits(bits, batch.vision_rows, batch.vision_cols)
        embeddings = embeddings.index_copy(0, batch.vision_at, vision.to(embeddings.dtype))
        return run_backbone(self.llm, embeddings[None], batch.position_ids[None], _FusedAttention.apply)[0]


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps and allocates: q, k, v, the output, and a float32 per head and token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _build(
    config: TextToImageConfig, layers: int, dtype: torch.dtype, checkpointing: bool, lora: LoraSection | None
) -> FusedAttentionModel:
    llm = copy.deepcopy(config.llm)
    llm.num_hidden_layers = layers
    if getattr(llm, "layer_types", None):
        llm.layer_types = (llm.layer_types * layers)[:layers]  # a model may have fewer than MORE
    ordinary = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a module of fake tensors cannot be cast afterwards
    try:
        model = FusedAttentionModel(dataclasses.replace(config, llm=llm))
        if lora is not None:
            # Adapters are made where and as they should be; peft moves them there all the same, and modules
            # of fake tensors cannot be moved.
            with exchanged(nn.Module, to=lambda module, *_, **__: module):
                add_adapters(model, lora)
        model.train()
    finally:
        torch.set_default_dtype(ordinary)
    if checkpointing:
        model.enable_activation_checkpointing()
    return model


def blank_batch(config: TextToImageConfig, pack: PackShape) -> PackedBatch:
    """A pack of this shape; what stands in it does not matter."""

    def places(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.int64)

    group, bits = config.head.parallel_num, config.head.ch_target
    patches = pack.vision_targets // group
    predicted = patches * group
    sequence = {
        name: places(pack.tokens) for name in ("input_ids", "position_ids", "document_ids", "block_ids")
    }
    fed = {name: places(predicted) for name in ("vision_at", "vision_rows", "vision_cols")}
    targets = {name: places(predicted) for name in ("predict_at", "predict_rows", "predict_cols")}
    text = {name: places(pack.text_targets) for name in ("text_at", "text_labels", "text_sample")}
    return PackedBatch(
        **sequence,
        **fed,
        **targets,
        **text,
        vision_bits=torch.zeros(predicted, bits, dtype=torch.float32),
        target_bits=torch.zeros(patches, group, bits, dtype=torch.float32),
        t=torch.zeros(patches),
        noise=torch.zeros(patches, group, bits, dtype=torch.float32),
        patch_sample=places(patches),
        keys=[],
    )
