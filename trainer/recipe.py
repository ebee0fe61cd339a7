"""The recipe of a training stage: one complete YAML file, typed, checked before any device is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data_pipeline.batch_recipe import BatchRecipe
from data_pipeline.ingest.storage import StoreAddress
from foundation.errors import RecipeError
from foundation.sections import Problem, Section, check
from models.flow_settings import FlowSettings
from trainer.model_recipe import ModelSection

Decay = Annotated[float, Field(ge=0, lt=1)]
Prompt = Annotated[str, Field(pattern=r"\S")]


class WorldSection(Section):
    """How many processes train.

    Attributes:
        processes: ranks that `bitdance train` starts on this machine. Under srun or torchrun, which start the
            ranks themselves, it is not looked at.
        threads: CPU threads of each rank.
        cache: folder on each node's own disk for copies of the latents' shards, shared by its ranks and kept
            between starts; null: a local dataset is read in place.
        cache_gb: what the copies may take, 1e9 bytes; null: no limit.
    """

    processes: PositiveInt = 1
    threads: PositiveInt = 1
    cache: str | None = None
    cache_gb: PositiveFloat | None = None


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
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-15
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None

    @check
    def _falls(self) -> Iterator[Problem]:
        if self.final_lr > self.lr:
            yield "final_lr", f"{self.final_lr} is above lr ({self.lr})"


class OffloadSection(Section):
    """Where ZeRO keeps what does not fit: host memory, or files on a local NVMe disk (`mapped_memory`).

    Attributes:
        nvme_path: folder on each node's own disk.
        pin_memory: lock the host memory, for faster copies to the device.
    """

    device: Literal["cpu", "nvme"]
    nvme_path: str | None = None
    pin_memory: bool = False

    @check
    def _path_for_nvme(self) -> Iterator[Problem]:
        if (self.device == "nvme") != (self.nvme_path is not None):
            yield "nvme_path", "must be given with device: nvme, and only then"
        if self.device == "nvme" and self.pin_memory:
            yield (
                "pin_memory",
                "what is on a disk cannot be locked into memory: leave it out with device: nvme",
            )


# ZeRO stages in which DeepSpeed reads the keys that are no mistake in any other.
STAGES_OF_KEYS = {
    "overlap_comm": (1, 2, 3),
    "contiguous_gradients": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
}


class ZeroSection(Section):
    """ZeRO, with DeepSpeed's own names; what is null is left to DeepSpeed.

    Attributes:
        stage: 0 keeps everything on every rank; 1 shards the optimizer, 2 also gradients, 3 also weights. In
            bfloat16 stage 1 adds micro-batches up in bfloat16, so that its gradient loses bits with their
            number (stages 2 and 3 add in float32).
        overlap_comm: reduce gradients while the backward pass goes on (stages 1 to 3, as the next two).
        contiguous_gradients: copy gradients into one buffer as they come.
        reduce_bucket_size: elements of gradients that are reduced at a time.
        allgather_bucket_size: no effect in any stage: torch's backends gather all new weights at once.
        stage3_prefetch_bucket_size: elements of weights gathered before their use (stage 3, like the next 3).
        stage3_param_persistence_threshold: smaller tensors stay whole on every rank.
        stage3_max_live_parameters: elements of gathered weights that are kept.
        stage3_max_reuse_distance: gathered weights are kept that are used again within so many elements.
        zero_hpz_partition_size: ranks that share a second, whole copy of the weights in stage 3 (1: none),
            for example a node's 8: the weights cross the network once a step, and come from within the node
            afterwards.
        offload_optimizer: master weights and moments are kept elsewhere (stages 1 to 3).
        offload_param: the shards of the weights are kept elsewhere (stage 3).
    """

    stage: Literal[0, 1, 2, 3] = 3
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    reduce_bucket_size: PositiveInt | None = None
    allgather_bucket_size: Annotated[int, Field(gt=0, multiple_of=2)] | None = None
    stage3_prefetch_bucket_size: Annotated[int, Field(ge=0)] | None = None
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] | None = None
    stage3_max_live_parameters: PositiveInt | None = None
    stage3_max_reuse_distance: PositiveInt | None = None
    zero_hpz_partition_size: PositiveInt | None = None
    offload_optimizer: OffloadSection | None = None
    offload_param: OffloadSection | None = None

    @check
    def _weights_are_sharded(self) -> Iterator[Problem]:
        if self.offload_param and self.stage != 3:
            yield "offload_param", f"needs stage 3, found stage {self.stage}"

    @check
    def _copy_is_of_shards(self) -> Iterator[Problem]:
        if self.copy_size > 1 and self.stage != 3:
            yield "zero_hpz_partition_size", f"needs stage 3, found stage {self.stage}"

    @check
    def _optimizer_is_sharded(self) -> Iterator[Problem]:
        if self.offload_optimizer and self.stage == 0:
            yield "offload_optimizer", "needs stage 1, 2 or 3, found stage 0"
        elif self.offload_optimizer and self.offload_optimizer.device == "nvme" and self.stage != 3:
            yield "offload_optimizer", f"to nvme needs stage 3, found stage {self.stage}"

    @property
    def without_effect(self) -> list[str]:
        """The keys that are given and do nothing in this stage; they may stay, for another stage to use."""
        given = self.model_dump(exclude_none=True)
        return [key for key, stages in STAGES_OF_KEYS.items() if key in given and self.stage not in stages]

    @property
    def copy_size(self) -> int:
        """Ranks that share a second, whole copy of the weights; 1: there is none."""
        return self.zero_hpz_partition_size or 1

    def can_share_copies(self, ranks: int) -> bool:
        """Whether so many ranks can be cut into groups of `copy_size`."""
        return ranks % min(self.copy_size, ranks) == 0

    def refuse_ranks(self, ranks: int) -> None:
        """
        Raises:
            RecipeError: so many ranks cannot share copies of the weights.
        """
        if not self.can_share_copies(ranks):
            raise RecipeError(
                f"zero.zero_hpz_partition_size is {self.copy_size}: {ranks} ranks are no multiple of it; "
                "take the number of GPUs of a node, or leave it out"
            )


class CheckpointSection(Section):
    """When to save, and what to keep.

    Attributes:
        every_steps: save after each multiple of so many steps.
        every_minutes: save after so many minutes since the last save, whatever the step. A save that is due
            while another is being written is postponed until that one is done.
        keep_last: newest checkpoints that stay.
        keep_every: the first checkpoint at or after each multiple of this step stays for ever.
        remote: an fsspec address (s3://bucket/prefix) that each checkpoint is copied below, into a folder of
            the run folder's name.
    """

    every_steps: PositiveInt | None = None
    every_minutes: PositiveFloat | None = 30.0
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    remote: StoreAddress | None = None


class GuardSection(Section):
    """When a step is not taken.

    Attributes:
        sigmas: a loss or gradient norm so many standard deviations above its recent mean is an outlier.
        window: steps taken that mean and deviation are computed over; no outliers before it is full.
        rewind_after: after so many skipped steps in a row the run goes back to its last checkpoint and passes
            over them.
        max_rewinds: rewinds, without a good step beyond the bad ones in between, after which the run ends
            (exit code 65).
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
        at_least_minutes: but always this long; the first one, which compiles and fills caches, half an hour.
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


class SamplesSection(Section):
    """Pictures that show how training goes on; see `trainer.samples`.

    Attributes:
        every_steps: pictures are made of the first checkpoint at or after each multiple of this step.
        prompts: what to paint, always with the same noise.
        size: height and width in pixels.
        guidance: scale of classifier-free guidance; 1: none.
        steps: solver steps of each patch.
        seed: of the noise.
        device: that samples: the cpu, beside training, or a GPU that no rank uses.
    """

    every_steps: PositiveInt
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=16)]
    size: tuple[PositiveInt, PositiveInt]
    guidance: Annotated[float, Field(ge=1)] = FlowSettings().guidance
    steps: PositiveInt = FlowSettings().steps
    seed: Annotated[int, Field(ge=0)] = 0
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"


class StageRecipe(Section):
    """One stage of training.

    Attributes:
        run: the run folder; the command tells a fresh start, a resume and a finished run apart by it.
        seed: of fresh weights (`data.seed` is that of the samples' order and of all draws).
        steps: number of optimizer steps.
        tokenizer: folder of the binary tokenizer, which goes into the export; training does not load it.
        precision: float32, or bfloat16 with float32 master weights.
        activation_checkpointing: recompute each layer's activations in the backward pass.
        fused_kernels: norms and SwiGLU of the backbone by liger-kernel: "auto" where there is a GPU and the
            package; "required" refuses to start without them.
        samples: pictures of fixed prompts on the way; none where null.
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
    fused_kernels: Literal["auto", "never", "required"] = "auto"
    world: WorldSection = WorldSection()
    zero: ZeroSection = ZeroSection()
    checkpoints: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    watchdog: WatchdogSection = WatchdogSection()
    metrics: MetricsSection = MetricsSection()
    samples: SamplesSection | None = None

    @check
    def _warms_up(self) -> Iterator[Problem]:
        if self.optimizer.warmup_steps > self.steps:
            yield (
                "optimizer.warmup_steps",
                f"{self.optimizer.warmup_steps} is above steps ({self.steps}): the learning rate would never "
                "reach lr",
            )

    @check
    def _has_master_weights(self) -> Iterator[Problem]:
        if self.precision == "bfloat16" and self.zero.stage == 0:
            yield (
                "zero.stage",
                "precision: bfloat16 needs stage 1, 2 or 3: stage 0 keeps no float32 master weights",
            )

    @check
    def _starts_from_another(self) -> Iterator[Problem]:
        start = self.model.init_from
        if start and Path(start).resolve() == (Path(self.run) / "export").resolve():
            yield "model.init_from", f"{start} is this run's own export"


# Keys that may change between a start and a resume: they decide where, how fast and how watched a run is, but
# not what it computes. (How many ranks, which ZeRO stage and whose kernels change a loss by rounding only.)
CHANGEABLE = frozenset(
    {"run", "world", "zero", "activation_checkpointing", "fused_kernels"}
    | {"checkpoints", "watchdog", "metrics", "samples"}
)
