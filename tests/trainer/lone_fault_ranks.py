"""A rank of `test_lone_fault.py`: a real start, in which one rank meets a fault while the others wait."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

import trainer.loop
import trainer.stage
from foundation.errors import DataError
from foundation.recipes import load_recipe
from trainer.rank import run_rank
from trainer.recipe import StageRecipe
from trainer.signals import StopFlag


def meet_or_wait(stage: object) -> None:
    dist.barrier()  # all are under way
    if dist.get_rank() == int(sys.argv[2]):
        raise DataError("00007.mds is damaged")
    dist.barrier()


trainer.stage.Stage = lambda *_: SimpleNamespace(close=lambda: None)  # type: ignore[misc, assignment]
trainer.loop.train = meet_or_wait  # type: ignore[assignment]
sys.exit(run_rank(load_recipe(StageRecipe, Path(sys.argv[1])), StopFlag(), False))
