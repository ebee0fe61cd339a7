"""The same numbers whatever happens, at length: `pytest -m long tests/integration/test_long_runs.py`."""

import shutil
from itertools import product
from pathlib import Path

import pytest
from small_stage import make_inputs, write_recipe
from whole_runs import bitdance, computed, kill_at_random, metrics, weights

pytestmark = pytest.mark.long

STEPS, BATCH, KILLS = 30, 24, 10
# (micro-steps, ranks) -> tokens of a pack that make so many micro-steps of the batch's 3,700 or so
MAX_TOKENS = {(1, 1): 4400, (1, 2): 2300, (1, 4): 1300, (3, 1): 1460, (3, 2): 800, (3, 4): 440}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    make_inputs(folder, samples={128: 24, 256: 24})
    return folder


def train(inputs: Path, name: str, **changes: object) -> list[dict]:
    run = inputs / name
    common = {"run": str(run), "steps": STEPS, "data__global_batch_size": BATCH}
    done = bitdance("train", str(write_recipe(inputs, f"{name}.yaml", **{**common, **changes})))
    assert done.returncode == 0, done.stdout
    return metrics(run)


def test_the_number_of_ranks_changes_losses_by_rounding_only(inputs: Path) -> None:
    """30 steps in float32 on 1, 2 and 4 ranks in 1 and 3 micro-steps, then 30 in bfloat16 from one export."""
    curves, half = {}, {}
    for micro_steps, ranks in product((1, 3), (1, 2, 4)):
        name = f"ranks-{ranks}-{micro_steps}"
        cut = {"world__processes": ranks, "data__max_tokens": MAX_TOKENS[micro_steps, ranks]}
        curves[name] = train(inputs, name, **cut)
        assert {line["micro_steps"] for line in curves[name]} == {micro_steps}
        start = {"p": 4, "init_from": str(inputs / "ranks-1-1" / "export"), "random": None, "head": None}
        half[name] = train(inputs, f"half-{name}", model=start, precision="bfloat16", **cut)
    for curve, tolerance in ((curves, 1e-5), (half, 1e-2)):
        expected = curve["ranks-1-1"]
        assert any(line["text_loss"] for line in expected)  # both tasks
        for name, found in curve.items():
            for ours, theirs in zip(found, expected, strict=True):
                for key in ("loss", "vision_loss_128", "vision_loss_256", "text_loss"):
                    assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (name, ours["step"], key)


def test_killed_ten_times_a_run_ends_in_the_same_bits(inputs: Path) -> None:
    two = {"steps": 60, "world__processes": 2, "checkpoints__every_steps": 4, "data__global_batch_size": 8}
    train(inputs, "undisturbed", **two)
    run = inputs / "killed"
    kill_at_random(write_recipe(inputs, "killed.yaml", **{"run": str(run), **two}), run, KILLS)
    assert computed(run) == computed(inputs / "undisturbed")
    assert weights(run) == weights(inputs / "undisturbed")


def test_a_fork_of_a_run_with_copies_in_a_store_trains_by_its_own_recipe(inputs: Path) -> None:
    store, run = inputs / "store", inputs / "copied"
    two = {"steps": 2, "checkpoints__every_steps": 1, "data__global_batch_size": 8}
    train(inputs, "copied", **two, checkpoints__remote=f"file://{store}")
    changed = ("--set", "optimizer.lr=0.01", "--fork")
    done = bitdance("train", str(inputs / "copied.yaml"), *changed)
    assert done.returncode == 0, done.stdout
    fork = inputs / "copied-2"
    assert [line["step"] for line in metrics(fork)] == [0, 1]
    assert weights(fork) != weights(run)
    assert sorted(path.name for path in store.iterdir()) == ["copied", "copied-2"]
    # Where both folders are lost, each run goes on from its own copies.
    for path, options in ((run, ()), (fork, changed[:2])):
        exported = weights(path)
        shutil.rmtree(path)
        done = bitdance("train", str(inputs / "copied.yaml"), *options, "--set", f"run={path}")
        assert done.returncode == 0 and "goes on at step 2 of 2" in done.stdout, done.stdout
        assert weights(path) == exported
