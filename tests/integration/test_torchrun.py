"""A first start under the real torchrun: rank 0 alone decides which folder is the run's."""

import os
import subprocess
import sys
from pathlib import Path

from small_stage import make_inputs, write_recipe
from whole_runs import events, metrics

from foundation.recipes import load_recipe
from trainer.recipe import StageRecipe
from trainer.run_folder import create_run

ROOT = Path(__file__).parents[2]


def test_a_first_start_makes_one_run_folder_for_all_ranks(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    other = create_run(load_recipe(StageRecipe, write_recipe(tmp_path, "other.yaml", steps=9)))
    other.lineage.write_text("{}")
    (tmp_path / "run-2" / "logs").mkdir(parents=True)  # left by a start that was killed at once
    recipe = write_recipe(tmp_path, steps=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone"]
    done = subprocess.run(
        [*torchrun, "-m", "bitdance", "train", str(recipe), "--fork"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    run = tmp_path / "run-2"
    assert [line["step"] for line in metrics(run)] == [0, 1]
    assert [event["ranks"] for event in events(run, "started")] == [3]
    assert sorted(log.name for log in (run / "logs").iterdir()) == [f"rank-{rank}.log" for rank in range(3)]
    assert not any(other.logs.iterdir())
    assert not (tmp_path / "run-3").exists()
