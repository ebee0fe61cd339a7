"""A whole plan: sizes, memory, packs, time, checkpoints, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foundation.errors import RecipeError
from trainer.costs import sample_cost
from trainer.plan.activations import ActivationBytes, activation_bytes
from trainer.plan.batches import BatchFigures, batch_figures, open_dataset
from trainer.plan.gpus import FRAGMENTATION, RESERVED, Gpu, find_gpu
from trainer.plan.model_size import QWEN_TEMPLATE, ModelSize, model_size
from trainer.plan.states import (
    Parameters,
    StateBytes,
    communication_bytes,
    count_parameters,
    save_copy_bytes,
    saved_bytes,
    state_bytes,
    step_bytes,
)
from trainer.plan.work import GPU_HOURS_BETWEEN_FAILURES, Saving, Work, run_time
from trainer.recipe import StageRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """What a plan has to be told, because no recipe knows it.

    Attributes:
        mfu: share of the GPUs' peak that forward and backward reach.
        price: dollars per GPU hour.
        mtbf_hours: of the whole job; None for what is usual with so many GPUs.
        stall_seconds: that a save holds training up.
    """

    mfu: float
    price: float | None
    mtbf_hours: float | None
    stall_seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        states: kept from step to step.
        communication: weights gathered, gradients on their way.
        activations: at the peak of forward and backward.
        step: what the optimizer's step needs instead of activations.
        save: in host memory, the copy of this rank's state that a save writes.
        reserved: what no tensor gets: context, libraries, fragmentation.
    """

    states: StateBytes
    communication: int
    activations: ActivationBytes
    step: int
    save: int

    @property
    def host(self) -> int:
        """Bytes of host memory for each rank, beside what Python and the latents take."""
        return self.states.host + self.save

    @property
    def tensors(self) -> int:
        return self.states.device + max(self.communication + self.activations.peak, self.step)

    @property
    def reserved(self) -> int:
        return int(RESERVED + FRAGMENTATION * self.tensors)

    @property
    def total(self) -> int:
        return self.tensors + self.reserved


@dataclass(frozen=True)
class Plan:
    """All that `bitdance plan` has to say."""

    recipe: StageRecipe
    gpu_name: str
    gpu: Gpu
    ranks: int
    rates: Rates
    model: ModelSize
    parameters: Parameters
    batch: BatchFigures
    memory: Memory
    work: Work
    saving: Saving
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.gpu.memory

    @property
    def seconds(self) -> float:
        """Of the whole run, failures included."""
        return self.work.steps * self.work.step_seconds / max(self.saving.effective, 1e-9)

    @property
    def dollars(self) -> float:
        price = self.gpu.price if self.rates.price is None else self.rates.price
        return self.seconds / 3600 * self.ranks * price


def make_plan(recipe: StageRecipe, recipe_path: Path, ranks: int, gpu_name: str, rates: Rates) -> Plan:
    """Plan a stage.

    Raises:
        RecipeError: the GPU isn't known, the model's size cannot be told, or the batch cannot be packed, or
            the ranks cannot share copies of the weights as the recipe says.
        DataError: the dataset is there and broken.
    """
    gpu = find_gpu(gpu_name)
    if ranks < 1 or not 0 < rates.mfu <= 1:
        raise RecipeError(f"--gpus {ranks}, --mfu {rates.mfu}: expected at least 1 GPU and an MFU in (0, 1]")
    recipe.zero.refuse_ranks(ranks)
    model = model_size(recipe, recipe_path)
    config = model.config
    assumptions = list(model.assumptions)
    if recipe.fused_kernels != "never":
        assumptions.append(
            "activations are counted with torch's norms and SwiGLU, an upper bound: those of fused_kernels = "
            f"{recipe.fused_kernels} keep less of a layer"
        )
    bits = config.head.ch_target
    dataset = open_dataset(recipe.data, config.tokenizer_downsample, assumptions)
    lora = recipe.model.lora
    cost = sample_cost(config, lora)
    batch = batch_figures(recipe.data, dataset, config.p, bits, ranks, recipe.steps, cost, QWEN_TEMPLATE)
    parameters = count_parameters(config, lora)
    activations = activation_bytes(
        config, batch.packs, DTYPES[recipe.precision], recipe.activation_checkpointing, lora
    )
    mtbf = rates.mtbf_hours or GPU_HOURS_BETWEEN_FAILURES / ranks
    saved = saved_bytes(parameters, recipe.optimizer.ema is not None)
    return Plan(
        recipe=recipe,
        gpu_name=gpu_name,
        gpu=gpu,
        ranks=ranks,
        rates=rates,
        model=model,
        parameters=parameters,
        batch=batch,
        memory=memory_of(recipe, parameters, activations, ranks),
        work=run_time(batch, gpu, ranks, rates.mfu, recipe, parameters),
        saving=Saving(saved, mtbf * 3600, rates.stall_seconds),
        assumptions=tuple(assumptions),
    )


def memory_of(
    recipe: StageRecipe, parameters: Parameters, activations: ActivationBytes, ranks: int
) -> Memory:
    """Memory of one GPU, given what a pack's activations take."""
    zero, precision, average = recipe.zero, recipe.precision, recipe.optimizer.ema is not None
    return Memory(
        states=state_bytes(parameters, zero, precision, ranks, average),
        communication=communication_bytes(parameters, zero, precision, ranks),
        activations=activations,
        step=step_bytes(parameters, zero, ranks),
        save=save_copy_bytes(parameters, zero, ranks, average),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The figures as plain JSON values; bytes, seconds, dollars."""
    states, activations = plan.memory.states, plan.memory.activations
    return {
        "fits": plan.fits,
        "gpus": plan.ranks,
        "gpu": plan.gpu_name,
        "parameters": {
            **plan.parameters.by_part,
            "total": plan.parameters.all,
            "trained": plan.parameters.total,
        },
        "memory": {
            **{f"states.{name}": value for name, value in vars(states).items()},
            "communication": plan.memory.communication,
            "activations": activations.peak,
            "activations.kept": activations.per_layer * activations.layers,
            "activations.head": activations.head,
            "activations.logits": activations.logits,
            "optimizer_step": plan.memory.step,
            "reserved": plan.memory.reserved,
            "total": plan.memory.total,
            "available": int(plan.gpu.memory),
            "host": plan.memory.host,
        },
        "batch": {name: value for name, value in vars(plan.batch).items() if name != "packs"},
        "step_seconds": plan.work.step_seconds,
        "compute_seconds": plan.work.compute_seconds,
        "network_seconds": plan.work.network_seconds,
        "host_seconds": plan.work.host_seconds,
        "run_seconds": plan.seconds,
        "dollars": plan.dollars,
        "checkpoint_bytes": plan.saving.bytes,
        "checkpoint_best_seconds": plan.saving.best_seconds,
        "effective_share": plan.saving.effective,
        "dataset_bytes": plan.batch.bits_bytes * plan.recipe.steps,
        "assumptions": list(plan.assumptions),
    }
