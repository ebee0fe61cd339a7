"""One rank of `test_full_disk.py`: a run whose save at step 4 meets a limit on the size of files.

The kernel's limit stands for a full disk: writing beyond it fails in the middle of a file, on every rank.
"""

import resource
import sys
from pathlib import Path

from foundation.recipes import load_recipe
from trainer.rank import run_rank
from trainer.recipe import StageRecipe
from trainer.signals import StopFlag
from trainer.stage import Stage

LIMIT = 64 * 1024  # bytes: more than the logs have, less than a rank's shards


def main(recipe: Path) -> int:
    save = Stage.save

    def save_without_space(stage: Stage) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if stage.progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
        save(stage)
        stage.checkpoints.wait()  # or the next save may be postponed
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    Stage.save = save_without_space  # type: ignore[method-assign]
    return run_rank(load_recipe(StageRecipe, recipe), StopFlag(), False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
