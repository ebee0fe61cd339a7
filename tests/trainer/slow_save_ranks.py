"""One rank of `test_slow_save.py`: a run whose first save does not end on rank 1 before step 5 has.

Where training waits for the save, the save gives up waiting for training after a while. Steps count as 100 s.
Printed: how long the groups of ranks wait, in seconds, before the first step, after it, and in a save.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _world

from foundation.recipes import load_recipe
from trainer import checkpoint
from trainer.metrics import read_lines
from trainer.rank import run_rank
from trainer.recipe import StageRecipe
from trainer.signals import StopFlag
from trainer.stage import Stage

PATIENCE = 20  # seconds


def say_timeouts(when: str) -> None:
    backends = (group._get_backend(torch.device("cpu")) for group in _world.pg_map)
    print(f"{when}: {sorted(backend.options._timeout.total_seconds() for backend in backends)}")


def main(recipe: Path) -> int:
    describe, init, unhurried = checkpoint.describe_file, Stage.__init__, Stage.unhurried
    step_done = Stage.step_done

    def tell_of_steps(stage: Stage) -> None:
        stage.watchdog._last -= 100.0
        step_done(stage)
        say_timeouts("after a step")

    @contextmanager
    def tell_of_saves(stage: Stage) -> Iterator[None]:
        with unhurried(stage):
            say_timeouts("in a save")
            yield

    def be_slow_on_rank_1(stage: Stage, *arguments: object) -> None:
        init(stage, *arguments)  # type: ignore[arg-type]
        say_timeouts("before the first step")

        def slowly(path: Path) -> dict[str, Any]:
            deadline = time.monotonic() + PATIENCE
            while len(read_lines(stage.run.metrics)) < 6 and time.monotonic() < deadline:
                time.sleep(0.05)
            return describe(path)

        if stage.rank == 1:
            checkpoint.describe_file = slowly  # type: ignore[attr-defined]

    Stage.__init__ = be_slow_on_rank_1  # type: ignore[method-assign,assignment]
    Stage.step_done, Stage.unhurried = tell_of_steps, tell_of_saves  # type: ignore[method-assign]
    return run_rank(load_recipe(StageRecipe, recipe), StopFlag(), False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
