"""One rank of `test_slow_save.py`: a run whose first save does not end on rank 1 before step 5 has.

Where training waits for the save, the save gives up waiting for training after a while.
"""

import sys
import time
from pathlib import Path
from typing import Any

from foundation.recipes import load_recipe
from trainer import checkpoint
from trainer.metrics import read_lines
from trainer.rank import run_rank
from trainer.recipe import StageRecipe
from trainer.signals import StopFlag
from trainer.stage import Stage

PATIENCE = 20  # seconds


def main(recipe: Path) -> int:
    describe, init = checkpoint.describe_file, Stage.__init__

    def be_slow_on_rank_1(stage: Stage, *arguments: object) -> None:
        init(stage, *arguments)  # type: ignore[arg-type]

        def slowly(path: Path) -> dict[str, Any]:
            deadline = time.monotonic() + PATIENCE
            while len(read_lines(stage.run.metrics)) < 6 and time.monotonic() < deadline:
                time.sleep(0.05)
            return describe(path)

        if stage.rank == 1:
            checkpoint.describe_file = slowly  # type: ignore[attr-defined]

    Stage.__init__ = be_slow_on_rank_1  # type: ignore[method-assign,assignment]
    return run_rank(load_recipe(StageRecipe, recipe), StopFlag(), False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
