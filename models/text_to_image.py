"""The text-to-image model: Qwen3 reads text and bits, a diffusion head writes the next patch of bits.

T packed tokens, D width, C bits per token, P = p*p tokens per step, N patches predicted, V vision tokens fed,
L text targets. Hidden states and embeddings have the weights' dtype, or autocast's; losses are float32.

Source: the paper (arXiv 2602.14041); modeling/mllm.py of the published code.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config

from models.backbone import Backend, backbone_config, build_backbone, plan_packed, run_backbone
from models.backbone.presets import VOCABULARY
from models.flow_settings import FlowSettings
from models.generation import Progress, check_request, generate_bits
from models.head import DiffusionHead, HeadConfig
from models.layout import PackedBatch, SequenceTokens, position_embedding
from models.projector import Projector

TEXT_LOSS_ROWS = 1024
"""Rows of logits that are widened to float32 at a time: 0.6 GB with Qwen3's vocabulary."""


@dataclass(frozen=True)
class TextToImageConfig:
    """Sizes of a text-to-image model; ValueError where its parts do not fit together."""

    llm: Qwen3Config
    head: HeadConfig
    tokenizer_downsample: int = 16
    """Pixels along the side of a token."""

    @property
    def p(self) -> int:
        """Patch side in tokens."""
        return isqrt(self.head.parallel_num)

    def __post_init__(self) -> None:
        width, head = self.llm.hidden_size, self.head
        problems = []
        if self.p**2 != head.parallel_num:
            problems.append(f"parallel_num is {head.parallel_num}, expected a square: 1, 4, 16 or 64")
        if head.ch_cond != width:
            problems.append(f"ch_cond is {head.ch_cond}, expected the backbone's hidden_size {width}")
        if width % 4:
            problems.append(f"hidden_size is {width}, expected a multiple of 4 for 2D positions")
        if head.variant != "text_to_image":
            problems.append(f"the head's variant is {head.variant!r}, expected 'text_to_image'")
        if head.diff_batch_mul != 1:
            problems.append(
                f"diff_batch_mul is {head.diff_batch_mul}, expected 1: a sample has one draw a patch"
            )
        if problems:
            raise ValueError("text-to-image config: " + "; ".join(problems))


def preset(
    backbone: str = "14b", p: int = 4, bits: int = 32, downsample: int = 16, vocabulary: int = VOCABULARY
) -> TextToImageConfig:
    """A published Qwen3 with a head of six blocks as wide as it, which for "14b" is the published model.

    p is the patch side in tokens, bits is C, vocabulary the rows of the embedding (see `backbone_config`).
    """
    llm = backbone_config(backbone, vocabulary)
    head = HeadConfig(
        ch_target=bits,
        ch_cond=llm.hidden_size,
        ch_latent=llm.hidden_size,
        depth_latent=6,
        depth_adanln=2,
        parallel_num=p * p,
    )
    return TextToImageConfig(llm, head, downsample)


class Losses(NamedTuple):
    """Losses before any reduction or weight; a pack's share of the loss is a sum of them over global counts.

    Where there is nothing to predict they are empty, and their sums still reach every parameter, with zeros.
    """

    vision: Tensor
    """float32 [N, P]: mean over bits of the squared velocity error."""
    text: Tensor
    """float32 [L]: cross-entropy in nats."""


class TextToImageModel(nn.Module):
    """Backbone `llm`, `projector` from bits to the backbone, `vision_head` from the backbone to bits.

    The parts' state dicts are those of the published folder layout. Every forward calls every part exactly
    once, whatever the pack holds, so that ranks of a partitioned model stay in step.
    """

    def __init__(self, config: TextToImageConfig) -> None:
        super().__init__()
        self.config = config
        self.llm = build_backbone(config.llm)
        self.projector = Projector(config.head.ch_target, config.llm.hidden_size)
        self.vision_head = DiffusionHead(config.head)

    def forward(self, batch: PackedBatch) -> Losses:
        """Teacher-forced losses of one packed sequence, whose patches have this model's p.

        float32 [N, P] of the patches and [L] of the text. ValueError where the shapes of bits, t and noise
        are not those of this model's head.
        """
        hidden = self.hidden_states(batch)
        return Losses(self._vision_loss(batch, hidden), self._text_loss(batch, hidden))

    def hidden_states(self, batch: PackedBatch, backend: Backend | None = None) -> Tensor:
        """[T, D] in the float dtype of the weights, after the final norm.

        `backend` overrides the attention chosen for the device; ValueError where it is unknown.
        """
        plan = plan_packed(batch.document_ids, batch.block_ids, backend)
        embeddings = self.llm.get_input_embeddings()(batch.input_ids)
        # With V = 0 one row of zeros goes through the projector, and none of it into the sequence.
        bits = (
            batch.vision_bits if len(batch.vision_at) else embeddings.new_zeros(1, self.config.head.ch_target)
        )
        rows, cols = _or_zero(batch.vision_rows), _or_zero(batch.vision_cols)
        vision = self.embed_bits(bits.to(embeddings.dtype), rows, cols)[: len(batch.vision_at)]
        embeddings = embeddings.index_copy(0, batch.vision_at, vision.to(embeddings.dtype))
        return run_backbone(self.llm, embeddings[None], batch.position_ids[None], plan)[0]

    def embed_bits(self, bits: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Bits [..., n, C] of tokens at rows [n], cols [n] -> what the backbone reads, [..., n, D].

        Bits are -1/+1 in the float dtype of the weights, which the result keeps; rows, cols int64.
        """
        return _add_positions(self.projector(bits), rows, cols)

    def head_condition(self, hidden: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Hidden states [..., n, D] that predict the tokens at rows [n], cols [n] -> what the head reads.

        The same shape and float dtype; rows, cols int64.
        """
        return _add_positions(hidden, rows, cols)

    def _vision_loss(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        patches, per_patch = len(batch.target_bits), self.config.head.parallel_num
        if patches:
            at, rows, cols = batch.predict_at, batch.predict_rows, batch.predict_cols
            target, t, noise = batch.target_bits, batch.t, batch.noise
        else:
            at = rows = cols = batch.input_ids.new_zeros(per_patch)
            t = torch.zeros(1, device=hidden.device)
            target = noise = t.new_zeros(1, per_patch, self.config.head.ch_target)
        condition = self.head_condition(hidden[at], rows, cols).unflatten(0, (-1, per_patch))
        return self.vision_head.loss(target, condition, t=t, noise=noise)[:patches]

    def _text_loss(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        logits = self.llm.lm_head(hidden[_or_zero(batch.text_at)])  # only where a text token is predicted
        parts = zip(
            logits.split(TEXT_LOSS_ROWS), _or_zero(batch.text_labels).split(TEXT_LOSS_ROWS), strict=True
        )
        losses = [checkpoint(_cross_entropy, *part, use_reentrant=False) for part in parts]
        return torch.cat(losses)[: len(batch.text_at)]

    def enable_activation_checkpointing(self) -> None:
        """Keep only the inputs of each layer of the backbone and each block of the head; compute again."""
        self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in self.vision_head.net.res_blocks:
            # On the instance: state dict names stay, and hooks of a sharding engine stay outside.
            block.forward = partial(checkpoint, type(block).forward, block, use_reentrant=False)

    def compile_for_sampling(self) -> None:
        """See `DiffusionHead.compile_for_sampling`; the backbone runs once a patch and stays as it is."""
        self.vision_head.compile_for_sampling()

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        uncond_ids: Sequence[int] | Tensor,
        h: int,
        w: int,
        *,
        tokens: SequenceTokens,
        num_images: int = 1,
        flow: FlowSettings = FlowSettings(),
        generator: torch.Generator | None = None,
        progress: Progress = iter,
    ) -> Tensor:
        """Draw pictures: float32 bits [num_images, h*w, C] of -1/+1 in patch raster order.

        Args:
            prompt_ids: everything before <|vision_start|> (`SequenceTokens.prompt`): a list, or an integer
                tensor [n].
            uncond_ids: the same of the unconditional half (`unconditional_prompt`); not read at guidance 1.
            h, w: the grid in tokens, multiples of p.
            flow: guidance scale, solver steps and sampler.
            generator: on the model's device; None takes torch's own. With float32 weights a seed gives the
                bits that it gives with the published code, which draws the start of a patch, then once per
                step. With bfloat16 weights it need not: positions are added in float32 here, rounded before
                that there.
            progress: goes through the list of patches, and may show how far it is.

        ValueError on a size that does not fit, a prompt that is empty, of another vocabulary or beyond the
        context, a guidance below 1, fewer than one picture or step, an unknown sampler, or arguments of
        another type.
        """
        if not isinstance(flow, FlowSettings):
            raise ValueError(f"flow is {reprlib.repr(flow)}: expected FlowSettings(guidance, steps, sampler)")
        halves = [prompt_ids, uncond_ids] if flow.guidance != 1.0 else [prompt_ids]
        prompts = check_request(self.config, tokens, halves, (h, w), num_images, flow, generator)
        return generate_bits(self, prompts, (h, w), tokens, num_images, flow, generator, progress)


def _or_zero(index: Tensor) -> Tensor:
    """The index itself, or [0] where it is empty: every part of the model runs on at least one row."""
    return index if len(index) else index.new_zeros(1)


def _add_positions(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """x [..., n, D] plus 2D positions, added in float32 and returned in x's dtype."""
    return (x + position_embedding(rows, cols, x.shape[-1])).to(x.dtype)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")
