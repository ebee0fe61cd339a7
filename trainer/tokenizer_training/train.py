"""Training of the binary tokenizer: a picture back from its bits, the bits sure and all in use."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.recipe_folder import RECORD_NAME, recipe_record
from foundation.errors import ExitCode, RecipeError
from foundation.files import atomic_write
from foundation.progress import say, track
from foundation.provenance import provenance
from models.tokenizer import BinaryTokenizer, GroupLFQ
from trainer.metrics import read_lines
from trainer.signals import STOP_SIGNALS, StopFlag
from trainer.tokenizer_training.batches import batch_of_step
from trainer.tokenizer_training.finished import is_finished
from trainer.tokenizer_training.pictures import PictureGroup, load_pictures, pictures_hash
from trainer.tokenizer_training.quality import reconstruction_quality, to_network
from trainer.tokenizer_training.recipe import LossSection, TokenizerRecipe
from trainer.tokenizer_training.state import (
    TrainingState,
    export,
    fresh_state,
    load_checkpoint,
    save_checkpoint,
)


def train_tokenizer(recipe: TokenizerRecipe) -> ExitCode:
    """Do what is left of the recipe: nothing, the rest after an interruption, or all of it.

    Returns:
        DONE, or REQUEUE where a signal stopped it and the same command goes on.

    Raises:
        RecipeError: the output folder belongs to another recipe, the device is not there, or the loss
        diverges. DataError: the pictures or the checkpoint cannot be used. KeyboardInterrupt: Ctrl-C, after a
        checkpoint.
    """
    if is_finished(recipe):
        return ExitCode.DONE
    folder = Path(recipe.output)
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device: cuda, but torch sees no GPU here; set device=cpu")
    groups = load_pictures(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RECORD_NAME) as file:
        file.write(recipe_record(recipe))
    with atomic_write(folder / "provenance.json") as file:
        json.dump(provenance(), file, indent=1)
    state = fresh_state(recipe, pictures_hash(groups))
    if load_checkpoint(state, folder):
        say(f"{folder}: goes on after step {state.step} of {recipe.steps}")
    with _stop_flag() as stop:
        run_steps(recipe, state, groups, folder, stop)
        if state.step < recipe.steps:
            save_checkpoint(state, folder)
    if state.step < recipe.steps:
        if stop.signal == "SIGINT":
            raise KeyboardInterrupt
        say(
            f"{stop.signal}: saved at step {state.step} of {recipe.steps}; the same command goes on from here"
        )
        return ExitCode.REQUEUE
    _finish(state, groups, folder)
    return ExitCode.DONE


def run_steps(
    recipe: TokenizerRecipe,
    state: TrainingState,
    groups: Sequence[PictureGroup],
    folder: Path,
    stop: StopFlag,
) -> None:
    """All steps that are left, or as many as there are before `stop`; a checkpoint now and then."""
    losses, optimizer = recipe.losses, recipe.optimizer
    quantizer = GroupLFQ(recipe.network.bits, recipe.network.bits // losses.group_bits).to(recipe.device)
    bfloat16 = uses_bfloat16(recipe)
    with _metrics_file(folder / "metrics.jsonl", state.step) as metrics:
        for step in track(range(state.step, recipe.steps), "Training the tokenizer", done=state.step):
            started = time.monotonic()
            pixels = torch.from_numpy(batch_of_step(recipe, groups, step)).to(recipe.device)
            with torch.autocast(recipe.device, torch.bfloat16, enabled=bfloat16):
                parts = loss_parts(state.network, quantizer, to_network(pixels), losses.distance)
            loss = weighted(parts, losses)
            state.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), optimizer.clip)
            if not math.isfinite(norm.item()):
                raise RecipeError(f"the gradient of step {step} is not finite: lower optimizer.lr")
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            state.optimizer.step()
            state.average()
            state.step = step + 1
            line = {name: round(value.item(), 6) for name, value in parts.items()}
            seconds = round(time.monotonic() - started, 4)
            record = {
                "step": step,
                "loss": round(loss.item(), 6),
                **line,
                "gradient_norm": round(norm.item(), 5),
            }
            metrics.write(json.dumps({**record, "size": list(pixels.shape[:3]), "seconds": seconds}) + "\n")
            if state.step % recipe.checkpoint_every == 0 and state.step < recipe.steps:
                save_checkpoint(state, folder)
            if stop.asked:
                return


def loss_parts(
    network: BinaryTokenizer, quantizer: GroupLFQ, image: Tensor, distance: str
) -> dict[str, Tensor]:
    """The terms of the loss, unweighted float32 scalars, for pictures [B, 3, height, width] in [-1, 1].

    `distance` is that of the pixels, `l1` or `l2`.
    """
    quantized = quantizer(network.encode_raw(image).float())
    difference = network.decode(quantized.bits).float() - image
    return {
        "reconstruction": (difference.abs() if distance == "l1" else difference.square()).mean(),
        "commitment": quantized.commitment,
        "entropy": quantized.entropy_loss,
        "per_sample_entropy": quantized.per_sample_entropy.detach(),
        "codebook_entropy": quantized.codebook_entropy.detach(),
    }


def weighted(parts: dict[str, Tensor], weights: LossSection) -> Tensor:
    """The loss: the recipe's weighted sum of the terms that train."""
    return (
        weights.reconstruction * parts["reconstruction"]
        + weights.commitment * parts["commitment"]
        + weights.entropy * parts["entropy"]
    )


def learning_rate(recipe: TokenizerRecipe, step: int) -> float:
    """Of a 0-based step: linear warm-up to `lr`, then half a cosine down to `final_lr` at the last step."""
    schedule = recipe.optimizer
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    passed = (step - schedule.warmup) / max(1, recipe.steps - 1 - schedule.warmup)
    return schedule.final_lr + (schedule.lr - schedule.final_lr) * 0.5 * (1.0 + math.cos(math.pi * passed))


def uses_bfloat16(recipe: TokenizerRecipe) -> bool:
    """Whether convolutions run in bfloat16; where the recipe leaves it open, the choice is told."""
    if recipe.precision != "auto":
        return recipe.precision == "bfloat16"
    if recipe.device == "cuda":
        chosen, reason = torch.cuda.is_bf16_supported(), "as the GPU has it"
    else:
        # Without matrix units (AMX) the processor's bfloat16 convolutions are slower than its float32 ones.
        chosen = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
        reason = "the processor has" + (" " if chosen else " no ") + "matrix units for bfloat16"
    say(f"precision: {'bfloat16' if chosen else 'float32'} ({reason})")
    return chosen


def _finish(state: TrainingState, groups: Sequence[PictureGroup], folder: Path) -> None:
    """Measure the finished tokenizer on its pictures, write what was found, and export it."""
    with state.averaged_weights() as network:
        quality = reconstruction_quality(network, groups)
    with atomic_write(folder / "quality.json") as file:
        json.dump(quality, file, indent=1)
    export(state, folder)
    for row in quality:
        height, width = row["size"]
        say(f"{height}x{width}: {row['pictures']} pictures, PSNR {row['psnr']:.2f} dB")


@contextmanager
def _stop_flag() -> Iterator[StopFlag]:
    """Signals that ask to stop only set the flag while a step is under way."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = StopFlag()
    flag.install()
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _metrics_file(path: Path, from_step: int) -> Iterator[Any]:
    """The file of a line per step, without the steps that are done again after an interruption."""
    kept = [line for line in read_lines(path) if line["step"] < from_step]
    with atomic_write(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
    with open(path, "a", buffering=1) as file:
        yield file
