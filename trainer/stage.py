"""A stage that is ready to train: data, model, state and logs, brought together on one rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.global_batch import BatchPlan
from data_pipeline.latents import LatentDataset
from data_pipeline.loader import StepBatch, StepLoader
from foundation.progress import say
from models.backbone import describe_attention, fuse_kernels
from models.text_to_image import TextToImageModel
from trainer.adapters import add_adapters, seed_dropout, start_tensors
from trainer.agreement import StepReport
from trainer.averaging import WeightAverage
from trainer.checkpoint import Checkpoints, using
from trainer.costs import sample_cost
from trainer.engine import Engine, build_module, training_device
from trainer.flat_shards import FlatShard, shards_of
from trainer.guard import Guard
from trainer.lineage import lineage_of
from trainer.meter import StepMeter
from trainer.metrics import EventLog, MetricsLog
from trainer.peers import decided_by_first
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder
from trainer.samples import SideSampler
from trainer.signals import StopFlag
from trainer.stage_start import check_dataset, open_start, refuse_kernels, start_files
from trainer.terminal import Terminal
from trainer.watchdog import UNHURRIED_SECONDS, Watchdog


@dataclass
class Progress:
    """What a checkpoint holds besides tensors and the guard's window; equal on all ranks.

    Attributes:
        step: steps done, so also the number of the next one.
        images: trained on so far.
        tokens: packed tokens trained on so far.
        seconds: spent in steps that count (not in those that were lost and done again).
        passed_over: steps that a rewind decided to leave out.
        skipped: steps that were not taken: number, reason, names of their samples.
        rewinds: since a step beyond the last that was passed over went well.
    """

    step: int = 0
    images: int = 0
    tokens: int = 0
    seconds: float = 0.0
    passed_over: set[int] = field(default_factory=set)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    rewinds: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "passed_over": sorted(self.passed_over)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        return cls(**{**values, "passed_over": set(values["passed_over"])})


class Stage:
    """One rank's part of a stage in training; see `loop.train` for what is done with it."""

    def __init__(self, recipe: StageRecipe, run: RunFolder, start: int, stop: StopFlag, terminal: Terminal):
        """Open everything that the recipe names, check that it belongs together, restore or start the state.

        Args:
            start: number of this start of the run.
            stop: set by signals.
            terminal: where a person may be looking on.

        Raises:
            RecipeError, DataError: what the recipe names cannot be trained on; nothing has been changed.
        """
        self.recipe, self.run, self.stop, self.terminal = recipe, run, stop, terminal
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        recipe.zero.refuse_ranks(self.ranks)
        self.events = EventLog(run, start, writes=self.rank == 0)
        self.source = open_start(recipe)
        self.unfused = refuse_kernels(recipe, training_device().type)
        world = recipe.world
        limit = int(world.cache_gb * 1e9) if world.cache_gb else None
        dataset = LatentDataset(recipe.data.latents, world.cache, limit)
        check_dataset(recipe, self.source, dataset)
        config, tokens = self.source.config, self.source.tokens
        self.cost = sample_cost(config, recipe.model.lora)
        self.plan = BatchPlan(recipe.data, dataset, config.p, tokens.template, self.ranks, self.cost)
        self.lineage = decided_by_first(lambda: self._find_lineage(dataset))
        self.engine = self._build_engine()
        decay = recipe.optimizer.ema
        self.average = WeightAverage(self.engine.state, decay) if decay else None
        self.guard, self.progress = Guard(recipe.guard), Progress()
        self.saved_step, self._saved_at = 0, time.monotonic()
        identity = self.lineage["recipe_sha256"]  # as the run's first start found it
        self.checkpoints = Checkpoints(run, start, recipe.checkpoints, identity, self.lineage, self.events)
        self.restore()
        self.loader = StepLoader(self.plan, self._encode, tokens, config.head, self.rank)
        self.watchdog = Watchdog(recipe.watchdog)
        self.meter = StepMeter(run, recipe, self.cost, self.ranks, speaks=self.rank == 0)
        self.metrics = MetricsLog(run, recipe, self.progress.step) if self.rank == 0 else None
        sampled = recipe.samples if self.rank == 0 else None
        self.sampler = SideSampler(run, sampled, self.events) if sampled else None
        self.events.write("started", step=self.progress.step, ranks=self.ranks, zero_stage=recipe.zero.stage)
        if self.rank == 0:
            say(self._opening_line())

    # --- state ----------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """The newest whole checkpoint; where there is none, the weights that the stage starts from."""
        manifest = self.checkpoints.load_newest(self._shards())
        lora = self.recipe.model.lora
        start = start_tensors(self.source, lora, self.recipe.seed)
        if manifest is None:
            self.engine.state.load_weights(start)
            self.engine.state.reset_optimizer()
            if self.average:
                self.average.restart()
            self.progress, self.guard, self.saved_step = Progress(), Guard(self.recipe.guard), 0
            return
        if lora is None:
            self.engine.state.publish()
        else:  # a checkpoint holds only what is trained
            self.engine.state.load_weights(start, only_frozen=True)
        self.engine.state.optimizer_steps = manifest.state["optimizer_steps"]
        self.progress = Progress.from_json(manifest.state["progress"])
        self.guard.load(manifest.state["guard"])
        self.saved_step = self.progress.step

    def save(self) -> None:
        """Begin to save the state after `progress.step` steps."""
        state = {
            "optimizer_steps": self.engine.state.optimizer_steps,
            "progress": self.progress.to_json(),
            "guard": self.guard.state(),
        }
        offload = self.recipe.zero.offload_optimizer
        in_place = offload is not None and offload.device == "nvme"
        with self.unhurried():
            self.checkpoints.save(self.progress.step, self._shards(), state, in_place)
        self.saved_step, self._saved_at = self.progress.step, time.monotonic()

    def clock_says_save(self) -> bool:
        """On rank 0: so much time has passed since the last save. (The ranks' clocks differ: one decides.)"""
        minutes = self.recipe.checkpoints.every_minutes
        return self.rank == 0 and minutes is not None and time.monotonic() - self._saved_at > minutes * 60

    def steps_say_save(self) -> bool:
        """A multiple of so many steps has been reached since the last save."""
        steps = self.recipe.checkpoints.every_steps
        return steps is not None and self.progress.step // steps > self.saved_step // steps

    def seed_dropout(self, micro_step: int) -> None:
        """Before a forward pass: what adapters drop, where the recipe has them drop anything."""
        lora = self.recipe.model.lora
        if lora is not None and lora.dropout:
            seed_dropout(self.recipe.seed, self.progress.step, self.rank, micro_step)

    def step_done(self) -> None:
        """A step has ended: how long the next one may take, and ranks wait for others in it."""
        self.watchdog.step_done()
        self.engine.wait_at_most(self.watchdog.patience())

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Around what is no step and may take its time; until the next step ends ranks wait for others that
        took more of it.
        """
        self.engine.wait_at_most(max(UNHURRIED_SECONDS, self.watchdog.patience()))
        with self.watchdog.paused():
            yield

    def end_steps(self) -> None:
        """No more steps: what comes now may take its time."""
        self.watchdog.stop()
        self.engine.wait_at_most(max(UNHURRIED_SECONDS, self.watchdog.patience()))

    def average_weights(self) -> None:
        """Move the average of the weights, where the recipe keeps one, after a step was taken."""
        if self.average:
            self.average.update()

    # --- log ------------------------------------------------------------------------------------------------

    def note_taken(self, loss: float, norm: float) -> None:
        """A step was taken."""
        self.guard.taken(loss, norm)
        if self.progress.step > max(self.progress.passed_over, default=-1):
            self.progress.rewinds = 0

    def note_skip(self, batch: StepBatch, reason: str) -> None:
        """A step was not taken."""
        self.guard.skipped()
        samples = [ref.name for ref in self.plan.step(batch.step)]
        skip = {"step": batch.step, "reason": reason, "samples": samples}
        self.progress.skipped.append(skip)
        self.events.write("skipped", **skip)
        if self.rank == 0:
            say(f"Step {skip['step']} is skipped: {reason}")

    def log_step(
        self,
        batch: StepBatch,
        means: dict[str, float],
        report: StepReport,
        lr: float,
        seconds: float,
        skip: str | None,
    ) -> None:
        """Count the step that has just ended and write its line."""
        if skip is None:
            self.progress.images += batch.counts.samples
            self.progress.tokens += batch.counts.tokens
        line = self.meter.line(self.progress, batch, means, report, lr, seconds, skip)
        if self.metrics is not None:
            self.metrics.write(line)
        loss = "" if line["loss"] is None else f"loss {line['loss']:.4f}"
        self.terminal.show_step(self.progress.step, self.recipe.steps, loss)
        if self.sampler is not None:
            self.sampler.look(self.checkpoints.newest)

    def finish_samples(self) -> None:
        """After the last save: let its pictures be made."""
        if self.sampler is not None:
            self.sampler.finish(self.checkpoints.newest)

    def close(self) -> None:
        """Let go of threads and files, each also where another fails; the process group stays."""
        with ExitStack() as steps:  # which takes the last first
            steps.callback(self.checkpoints.close)
            if self.metrics is not None:
                steps.callback(self.metrics.close)
            if self.sampler is not None:
                steps.callback(self.sampler.close)
            steps.callback(self.loader.close)
            steps.callback(self.watchdog.stop)
            steps.callback(self.terminal.end_steps)

    # --- inside ---------------------------------------------------------------------------------------------

    def _build_engine(self) -> Engine:
        zero, precision = self.recipe.zero, self.recipe.precision
        lora = self.recipe.model.lora

        def build() -> TextToImageModel:
            model = TextToImageModel(self.source.config)
            if self.unfused is None:
                fuse_kernels(model.llm)
            if lora is not None:
                add_adapters(model, lora)
            return model

        model = build_module(
            build,
            lambda model: model.llm.tie_weights(),
            zero,
            precision,
        )
        if self.recipe.activation_checkpointing:
            model.enable_activation_checkpointing()
        return Engine(model.train(), self.recipe.optimizer, zero, precision)

    def _encode(self, caption: str) -> list[int]:
        """Token ids of a caption. Called by several threads: the backend's own method changes no state."""
        ids: list[int] = self.source.text_tokenizer.backend_tokenizer.encode(
            caption, add_special_tokens=False
        ).ids
        return ids

    def _shards(self) -> dict[str, FlatShard]:
        return shards_of(self.engine.state.fragments(), self.average.values if self.average else None)

    def _find_lineage(self, dataset: LatentDataset) -> dict[str, Any]:
        with using(self.run.path):
            return lineage_of(self.run, self.recipe, dataset.manifest, start_files(self.recipe))

    def _opening_line(self) -> str:
        step, steps = self.progress.step, self.recipe.steps
        what = f"goes on at step {step}" if step else "starts"
        how = f"{self.recipe.precision}, ZeRO-{self.recipe.zero.stage}, "
        how += describe_attention(self.engine.device.type)
        kernels = "liger-kernel" if self.unfused is None else f"torch ({self.unfused})"
        how += f", norms and SwiGLU by {kernels}"
        millions = sum(torch.Size(spec.shape).numel() for spec in self.source.specs.values()) / 1e6
        if unused := self.recipe.zero.without_effect:
            how += f". Without effect in this stage: {', '.join(f'zero.{key}' for key in unused)}"
        return f"{self.run.path} {what} of {steps}: {millions:.3g}M parameters, {self.ranks} ranks, {how}"
