"""One rank of `test_skipping.py`: a run whose rank 1 meets NaN gradients at given steps.

Arguments: recipe, then the steps. A step that is passed over later is not met again.
"""

import sys
from pathlib import Path

from torch import Tensor

from foundation.recipes import load_recipe
from models.text_to_image import Losses
from trainer.losses import StepLosses
from trainer.rank import run_rank
from trainer.recipe import StageRecipe
from trainer.signals import StopFlag
from trainer.stage import Stage


def main(recipe: Path, bad_steps: set[int]) -> int:
    now = {"step": -1, "rank": -1}
    add, init = StepLosses.add, Stage.__init__

    def remember_rank(stage: Stage, *arguments: object) -> None:
        init(stage, *arguments)  # type: ignore[arg-type]
        now["rank"] = stage.rank
        step = stage.loader.step

        def remember_step(number: int) -> object:
            now["step"] = number
            return step(number)

        stage.loader.step = remember_step  # type: ignore[method-assign,assignment]

    def spoil(losses: StepLosses, micro: Losses, patch_resolution: Tensor) -> Tensor:
        share = add(losses, micro, patch_resolution)
        bad = now["rank"] == 1 and now["step"] in bad_steps
        return share * float("nan") if bad else share

    Stage.__init__ = remember_rank  # type: ignore[method-assign,assignment]
    StepLosses.add = spoil  # type: ignore[method-assign]
    return run_rank(load_recipe(StageRecipe, recipe), StopFlag(), False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), {int(step) for step in sys.argv[2:]}))
