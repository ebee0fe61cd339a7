"""Samples a checkpoint: `python -m trainer.sample_process RUN STEP PARENT`, started by `samples.SideSampler`.

The checkpoint becomes a folder in the published layout, read tensor by tensor, and `bitdance generate`
samples that as it samples any other model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from foundation.parent_process import die_with
from foundation.recipes import load_recipe
from models.weights import ModelSource, TensorSpec, write_source
from trainer.adapters import adapter_shapes, merged, parameter_name
from trainer.flat_shards import SavedTensors
from trainer.recipe import SamplesSection, StageRecipe
from trainer.run_folder import RunFolder
from trainer.samples import exported_copy, partial_pictures
from trainer.stage_start import open_start

NICENESS = 10  # training goes first where both run on the same cores


def main(arguments: list[str]) -> None:
    """Export a checkpoint, then become `bitdance generate`."""
    folder, step, parent = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    die_with(parent)
    os.nice(NICENESS)
    run = RunFolder(folder)
    recipe = load_recipe(StageRecipe, run.recipe)
    assert recipe.samples is not None
    model = exported_copy(run, step)
    write_source(saved_model(recipe, run.checkpoints / f"step-{step}"), model)
    command = generate_command(recipe.samples, model, partial_pictures(run, step))
    os.execv(sys.executable, [sys.executable, *command])


def saved_model(recipe: StageRecipe, checkpoint: Path) -> ModelSource:
    """The model that a checkpoint holds (its average, where there is one), as an export would have it."""
    start, lora = open_start(recipe), recipe.model.lora
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    specs = {name: TensorSpec(spec.shape, dtype) for name, spec in start.specs.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        saved, kind = SavedTensors(checkpoint), "ema" if recipe.optimizer.ema else "master"
        # Only under adapters is anything left of what the stage started from.
        stored = start.tensors() if lora else ((name, torch.empty(0)) for name in specs)
        for name, untrained in stored:
            shapes = {parameter_name(name, lora): tuple(specs[name].shape), **adapter_shapes(name, lora)}

            def whole(
                parameter: str, untrained: Tensor = untrained, shapes: dict[str, tuple[int, ...]] = shapes
            ) -> Tensor:
                key = f"{kind}/{parameter}"
                return saved[key].reshape(shapes[parameter]) if key in saved else untrained.to(dtype)

            yield name, merged(name, lora, whole).to(dtype)

    return replace(start, specs=specs, tensors=tensors, tokenizer_folder=Path(recipe.tokenizer))


def generate_command(section: SamplesSection, model: Path, output: Path) -> list[str]:
    """Arguments of the Python that samples the exported copy."""
    height, width = section.size
    options = {
        "--size": f"{height}x{width}",
        "--guidance": section.guidance,
        "--steps": section.steps,
        "--seed": section.seed,
        "--device": section.device,
        "--output": output,
    }
    arguments = [str(part) for pair in options.items() for part in pair]
    for prompt in section.prompts:
        arguments += ["--prompt", prompt]
    return ["-m", "bitdance", "generate", str(model), *arguments]


if __name__ == "__main__":
    main(sys.argv[1:])
