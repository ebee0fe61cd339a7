"""The part of a stage's recipe that says what is trained, and what it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from foundation.sections import Problem, Section, check

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


class BackboneSection(Section):
    """A Qwen3 of one's own size, for random weights; the names are those of transformers' `Qwen3Config`.

    Attributes:
        hidden_size: a multiple of 4: two axes of positions, each sines and cosines.
        num_attention_heads: a multiple of num_key_value_heads, each of which so many query heads share.
        head_dim: even: rotary positions turn pairs.
    """

    hidden_size: Annotated[int, Field(gt=0, multiple_of=4)]
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: Annotated[int, Field(gt=0, multiple_of=2)]
    max_position_embeddings: PositiveInt = 40960
    rope_theta: PositiveFloat = 1_000_000.0
    tie_word_embeddings: bool = False

    @check
    def _heads_share_evenly(self) -> Iterator[Problem]:
        if self.num_attention_heads % self.num_key_value_heads:
            shared = self.num_key_value_heads
            yield (
                "num_attention_heads",
                f"{self.num_attention_heads} is no multiple of num_key_value_heads ({shared})",
            )


class RandomSection(Section):
    """Random weights all over, for small models.

    Attributes:
        backbone: sizes of the language model.
        text_tokenizer: folder of a transformers tokenizer; its vocabulary sets the embedding's size.
    """

    backbone: BackboneSection
    text_tokenizer: str


class HeadSection(Section):
    """The binary diffusion head of a model that starts without one (an export brings its own).

    Attributes:
        width: W, a multiple of 128, the width of one attention head.
        depth: blocks.
        adaln: adaptive-norm projections, each shared by depth/adaln consecutive blocks.
        swiglu: gated feed-forward.
        P_mean, P_std: of the normal whose sigmoid is the time t of a training example.
        time_shift: s of shift(t); 1 leaves t alone.
    """

    width: Annotated[int, Field(gt=0, multiple_of=128)]
    depth: PositiveInt = 6
    adaln: PositiveInt = 2
    swiglu: bool = True
    P_mean: float = -0.8
    P_std: PositiveFloat = 0.8
    time_shift: PositiveFloat = 1.0

    @check
    def _blocks_share_evenly(self) -> Iterator[Problem]:
        if self.depth % self.adaln:
            yield "depth", f"{self.depth} is no multiple of adaln ({self.adaln})"


class LoraSection(Section):
    """Low-rank adapters on the backbone, by the library peft (Hu et al., LoRA, arXiv 2106.09685).

    The backbone itself, embeddings included, stays as it is and has no optimizer state; adapters, projector
    and head are trained. An export holds the sum, W + alpha/rank * B A, in the usual layout.

    Attributes:
        rank: inner width of an adapter.
        alpha: its output is multiplied by alpha/rank.
        dropout: of an adapter's input. What is dropped depends on step, rank and micro-step, so it is another
            on another number of ranks.
        targets: linear layers of each layer of the backbone that get an adapter.
    """

    rank: PositiveInt = 32
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[LoraTarget, ...] = LORA_TARGETS

    @check
    def _some_targets_once(self) -> Iterator[Problem]:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            found = f"found {list(self.targets)}" if self.targets else "found none"
            yield "targets", f"expected some of {', '.join(LORA_TARGETS)}, each once, {found}"


class ModelSection(Section):
    """What is trained, and the weights that it starts from: exactly one of init_from, pretrained and random.

    Attributes:
        p: side of a patch in tokens; p*p tokens are predicted per step.
        init_from: the export of the stage before, or a published folder. Weights only.
        grow_from: p of `init_from` where it differs; the missing query embeddings are made from those there.
        pretrained: a Qwen3 language model (folder or hub name), with a fresh head and projector.
        random: random weights.
        head: the head's size; with `init_from` it comes from there.
        lora: train adapters of the backbone in place of its weights; the head and the projector in full.
    """

    p: Literal[1, 2, 4, 8]
    init_from: str | None = None
    grow_from: Literal[1, 2, 4] | None = None
    pretrained: str | None = None
    random: RandomSection | None = None
    head: HeadSection | None = None
    lora: LoraSection | None = None

    def _starts(self) -> dict[str, object]:
        """The starts that are given; of a recipe these are to be one."""
        starts = {"init_from": self.init_from, "pretrained": self.pretrained, "random": self.random}
        return {key: start for key, start in starts.items() if start is not None}

    @check
    def _one_start(self) -> Iterator[Problem]:
        if len(given := self._starts()) != 1:
            found = " and ".join(given) or "none of them"
            yield "", f"exactly one of init_from, pretrained and random must be given, found {found}"

    @check
    def _head_of_its_own(self) -> Iterator[Problem]:
        if len(self._starts()) == 1 and (self.init_from is None) == (self.head is None):
            yield "head", "must be given with pretrained and random, and only then (an export has its own)"

    @check
    def _grows(self) -> Iterator[Problem]:
        if self.grow_from is not None and (self.init_from is None or self.grow_from >= self.p):
            yield "grow_from", f"{self.grow_from} must be below p ({self.p}), and needs init_from"

    @check
    def _adapts_what_is_there(self) -> Iterator[Problem]:
        if self.lora is not None and (self.init_from is None or self.grow_from is not None):
            yield (
                "lora",
                "needs init_from, and no grow_from: with adapters the embedding stays as it is, so the "
                "tokens of pictures must be in it already",
            )
