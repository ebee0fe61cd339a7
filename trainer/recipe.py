"""The recipe of a training stage: one complete YAML file, typed, checked before any device is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipeline.batch_recipe import BatchRecipe
from foundation.recipes import Section

Share = Annotated[float, Field(ge=0, le=1)]


class WorldSection(Section):
    """How many processes train.

    Attributes:
        processes: ranks that `bitdance train` starts on this machine. Under srun or torchrun, which start the
            ranks themselves, it is not looked at.
        threads: CPU threads of each rank.
    """

    processes: PositiveInt = 1
    threads: PositiveInt = 1


class BackboneSection(Section):
    """A Qwen3 of one's own size, for random weights; the names are those of transformers' `Qwen3Config`."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt = 40960
    rope_theta: PositiveFloat = 1_000_000.0
    tie_word_embeddings: bool = False


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

    @model_validator(mode="after")
    def _blocks_share_evenly(self) -> Self:
        if self.depth % self.adaln:
            raise ValueError(f"depth is {self.depth}: it must be a multiple of adaln, which is {self.adaln}")
        return self


class ModelSection(Section):
    """What is trained, and the weights that it starts from: exactly one of init_from, pretrained and random.

    Attributes:
        p: side of a patch in tokens; p*p tokens are predicted per step.
        init_from: the export of the stage before, or a published folder. Weights only.
        grow_from: p of `init_from` where it differs; the missing query embeddings are made from those there.
        pretrained: a Qwen3 language model (folder or hub name), with a fresh head and projector.
        random: random weights.
        head: the head's size; with `init_from` it comes from there.
    """

    p: Literal[1, 2, 4, 8]
    init_from: str | None = None
    grow_from: Literal[1, 2, 4] | None = None
    pretrained: str | None = None
    random: RandomSection | None = None
    head: HeadSection | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        given = [key for key in ("init_from", "pretrained", "random") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of init_from, pretrained and random must be given, found {found}")
        if (self.init_from is None) == (self.head is None):
            raise ValueError(
                "head must be given with pretrained and random, and only then (an export has its own)"
            )
        if self.grow_from is not None and (self.init_from is None or self.grow_from >= self.p):
            raise ValueError(f"grow_from ({self.grow_from}) needs init_from, and must be below p ({self.p})")
        return self


class DataSection(BatchRecipe):
    """The latents, and how steps are made of them (the other keys are `data_pipeline.batch_recipe`'s).

    Attributes:
        latents: folder, or object store prefix, of a finished latent dataset.
    """

    latents: str


class LossSection(Section):
    """Weights of the two losses: vision is a mean over predicted tokens, text over caption tokens."""

    vision: Annotated[float, Field(ge=0)] = 1.0
    text: Annotated[float, Field(ge=0)] = 0.01


class OptimizerSection(Section):
    """AdamW and its learning rate.

    Attributes:
        lr: peak learning rate, reached after `warmup_steps` of linear growth.
        schedule: "constant" stays there; "cosine" falls to `final_lr` at the last step.
        clip: L2 norm that a gradient is scaled down to.
        ema: decay of an average of the weights, which is then what a stage exports; none where null.
    """

    lr: PositiveFloat
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: PositiveFloat = 1e-15
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr ({self.final_lr}) is above lr ({self.lr})")
        return self


class OffloadSection(Section):
    """Where ZeRO keeps what does not fit: host memory, or a local NVMe folder."""

    device: Literal["cpu", "nvme"]
    nvme_path: str | None = None
    pin_memory: bool = False

    @model_validator(mode="after")
    def _path_for_nvme(self) -> Self:
        if (self.device == "nvme") != (self.nvme_path is not None):
            raise ValueError("nvme_path must be given with device: nvme, and only then")
        return self


class ZeroSection(Section):
    """ZeRO, with DeepSpeed's own names; what is null is left to DeepSpeed.

    Attributes:
        stage: 0 keeps everything on every rank; 1 shards the optimizer, 2 also gradients, 3 also weights.
        zero_hpz_partition_size: ranks that share a second, whole copy of the weights in stage 3 (1: none).
    """

    stage: Literal[0, 1, 2, 3] = 3
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_bucket_size: PositiveInt | None = None
    allgather_bucket_size: PositiveInt | None = None
    stage3_prefetch_bucket_size: Annotated[int, Field(ge=0)] | None = None
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] | None = None
    stage3_max_live_parameters: PositiveInt | None = None
    stage3_max_reuse_distance: PositiveInt | None = None
    zero_hpz_partition_size: PositiveInt | None = None
    offload_optimizer: OffloadSection | None = None
    offload_param: OffloadSection | None = None

    @model_validator(mode="after")
    def _offload_needs_sharding(self) -> Self:
        if self.offload_param and self.stage != 3:
            raise ValueError(f"offload_param needs stage 3, found stage {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, found stage 0")
        return self


class CheckpointSection(Section):
    """When to save, and what to keep.

    Attributes:
        every_steps: save after so many steps since the last save.
        every_minutes: save after so many minutes since the last save; whichever of the two comes first.
        keep_last: newest checkpoints that stay.
        keep_every: checkpoints whose step is a multiple of this stay for ever.
        remote: an fsspec address (s3://bucket/prefix) that each checkpoint is copied to.
    """

    every_steps: PositiveInt | None = None
    every_minutes: PositiveFloat | None = 30.0
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    remote: str | None = None


class GuardSection(Section):
    """When a step is not taken.

    Attributes:
        sigmas: a loss or gradient norm so many standard deviations above its recent mean is an outlier.
        window: steps taken that mean and deviation are computed over; no outliers before it is full.
        rewind_after: after so many skipped steps in a row the run goes back to its last checkpoint and passes
            over them.
        max_rewinds: rewinds without a new checkpoint in between, after which the run ends (exit code 65).
    """

    sigmas: PositiveFloat = 6.0
    window: Annotated[int, Field(ge=8)] = 128
    rewind_after: PositiveInt = 3
    max_rewinds: PositiveInt = 3


class WatchdogSection(Section):
    """When a step counts as hung: all stacks are written to the ranks' logs, and the job ends with exit code
    75.

    Attributes:
        factor: a step may take so many times the median of the last ones,
        at_least_minutes: but always this long.
    """

    factor: PositiveFloat = 20.0
    at_least_minutes: PositiveFloat = 10.0


class MetricsSection(Section):
    """Where metrics go besides `metrics.jsonl`.

    Attributes:
        wandb: "online" falls back to "offline" where the server cannot be reached.
        print_every: steps between lines on the terminal.
        peak_tflops: of one device, in the precision trained in; with it, MFU is reported.
    """

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "bitdance"
    print_every: PositiveInt = 20
    peak_tflops: PositiveFloat | None = None


class StageRecipe(Section):
    """One stage of training.

    Attributes:
        run: the run folder; the command tells a fresh start, a resume and a finished run apart by it.
        seed: of fresh weights (`data.seed` is that of the samples' order and of all draws).
        steps: number of optimizer steps.
        tokenizer: folder of the binary tokenizer, which goes into the export; training does not load it.
        precision: float32, or bfloat16 with float32 master weights.
        activation_checkpointing: recompute each layer's activations in the backward pass.
    """

    run: str
    seed: Annotated[int, Field(ge=0)] = 0
    steps: PositiveInt
    model: ModelSection
    tokenizer: str
    data: DataSection
    loss: LossSection = LossSection()
    optimizer: OptimizerSection
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    activation_checkpointing: bool = False
    world: WorldSection = WorldSection()
    zero: ZeroSection = ZeroSection()
    checkpoints: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    watchdog: WatchdogSection = WatchdogSection()
    metrics: MetricsSection = MetricsSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        wrong = []
        if self.optimizer.warmup_steps > self.steps:
            wrong.append(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) is above steps ({self.steps}): the "
                "learning rate would never reach lr"
            )
        if self.precision == "bfloat16" and self.zero.stage == 0:
            wrong.append(
                "precision: bfloat16 needs zero.stage 1, 2 or 3: stage 0 keeps no float32 master weights"
            )
        if (
            self.model.init_from
            and Path(self.model.init_from).resolve() == (Path(self.run) / "export").resolve()
        ):
            wrong.append(f"model.init_from is this run's own export ({self.model.init_from})")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


# Keys that may change between a start and a resume: they decide where, how fast and how watched a run is, but
# not what it computes. (How many ranks and which ZeRO stage change a loss by rounding only.)
CHANGEABLE = frozenset(
    {"run", "world", "zero", "activation_checkpointing", "checkpoints", "watchdog", "metrics"}
)
