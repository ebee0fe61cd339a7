"""What a training is at a step: network, optimizer, averaged weights; its checkpoint, and its export."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from foundation.errors import DataError
from foundation.files import atomic_write, fsync_folder
from models.tokenizer import BinaryTokenizer, TokenizerConfig, save_tokenizer
from trainer.tokenizer_training.recipe import TokenizerRecipe

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass
class TrainingState:
    """Everything that a step changes. `step` counts the steps done; `pictures` is the hash of what it learns
    from.
    """

    network: BinaryTokenizer
    optimizer: torch.optim.Adam
    ema_decay: float | None
    pictures: str
    step: int = 0
    ema: dict[str, Tensor] = field(default_factory=dict)

    def average(self) -> None:
        """Move the averaged weights towards the present ones, where the recipe wants an average."""
        if self.ema_decay is not None:
            for name, value in self.network.state_dict().items():
                self.ema[name].lerp_(value, 1.0 - self.ema_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[BinaryTokenizer]:
        """The network with the weights that are exported: the averaged ones, where there are any."""
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.ema or trained)
        try:
            yield self.network
        finally:
            self.network.load_state_dict(trained)


def fresh_state(recipe: TokenizerRecipe, pictures: str) -> TrainingState:
    """Step 0 of the recipe: weights from its seed alone."""
    sizes = recipe.network
    config = TokenizerConfig(
        ch=sizes.ch,
        ch_mult=tuple(sizes.ch_mult),
        z_channels=sizes.bits,
        num_res_blocks=sizes.num_res_blocks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = BinaryTokenizer(config)
    network.to(recipe.device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=recipe.optimizer.lr, betas=recipe.optimizer.betas, fused=True
    )
    state = TrainingState(network, optimizer, recipe.optimizer.ema, pictures)
    if recipe.optimizer.ema is not None:
        state.ema = {name: value.clone() for name, value in network.state_dict().items()}
    return state


def save_checkpoint(state: TrainingState, folder: Path) -> None:
    """Replace the checkpoint in `folder` as a whole."""
    with atomic_write(folder / CHECKPOINT_FILE, "wb") as file:
        torch.save(
            {
                "step": state.step,
                "network": state.network.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "ema": state.ema,
                "pictures": state.pictures,
            },
            file,
        )


def load_checkpoint(state: TrainingState, folder: Path) -> bool:
    """Bring `state` to the checkpoint in `folder`; False where there is none.

    Raises:
        DataError: the file cannot be read, or was trained on other pictures.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return False
    device = next(state.network.parameters()).device
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["pictures"] != state.pictures:
            raise DataError(
                f"{path} was trained on other pictures than the input holds now: "
                f"remove {folder} to start anew, or bring the input back"
            )
        state.network.load_state_dict(saved["network"])
        state.optimizer.load_state_dict(saved["optimizer"])
        state.ema = saved["ema"]
        state.step = saved["step"]
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}): remove {folder} to start anew") from None
    return True


def export(state: TrainingState, folder: Path) -> None:
    """Put the finished tokenizer into `folder`, the config last: where it stands, all stands."""
    partial = folder / ".export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with state.averaged_weights() as network:
        save_tokenizer(network, partial)
    for name in ("ae.safetensors", "ae_config.json"):
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial / name, folder / name)
    partial.rmdir()
    fsync_folder(folder)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
