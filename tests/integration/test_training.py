"""Whole runs of `bitdance train` in real processes: resume, other numbers of ranks, signals, hand-off."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_stage import make_inputs, write_recipe
from whole_runs import (
    COMPUTED,
    bitdance,
    computed,
    events,
    kill_at_random,
    metrics,
    start,
    wait_until,
    weights,
)

ROOT = Path(__file__).parents[2]

STEPS = 24
KILLS = 3
CHANGES = {"steps": STEPS, "world__processes": 2, "checkpoints__every_steps": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path) -> Path:
    """A run of 2 ranks under ZeRO-3 from beginning to end."""
    recipe = write_recipe(inputs, "undisturbed.yaml", run=str(inputs / "undisturbed"), **CHANGES)
    done = bitdance("train", str(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    return inputs / "undisturbed"


def test_undisturbed_run_leaves_what_a_run_should(undisturbed: Path) -> None:
    assert [line["step"] for line in metrics(undisturbed)] == list(range(STEPS))
    names = {path.name for path in undisturbed.iterdir()}
    assert {"recipe.yaml", "provenance.json", "lineage.json", "metrics.jsonl", "export", "logs"} <= names
    assert sorted(path.name for path in (undisturbed / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert "rank 1 of 2 on " in (undisturbed / "logs" / "rank-1.log").read_text()
    chosen = "ZeRO-3, attention documents, norms and SwiGLU by torch (no GPU)"
    assert chosen in (undisturbed / "logs" / "rank-0.log").read_text()
    saved = [event["step"] for event in events(undisturbed, "saved")]
    assert saved[0] == 4 and saved[-1] == STEPS  # where the disk is slow, one between them may be postponed
    assert all(after // 4 > before // 4 for before, after in pairwise(saved))
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2  # keep_last


def test_killed_at_any_moment_a_run_ends_in_the_same_bits(inputs: Path, undisturbed: Path) -> None:
    run = inputs / "killed"
    recipe = write_recipe(inputs, "killed.yaml", run=str(run), **CHANGES)
    kill_at_random(recipe, run, KILLS)
    assert computed(run) == computed(undisturbed)
    assert weights(run) == weights(undisturbed)


@pytest.mark.long
def test_other_ranks_and_stages_go_on_with_the_same_curve(inputs: Path, undisturbed: Path) -> None:
    """2 ranks, then 1, 4 and 2, under ZeRO-3 with all of it on a disk, 0, 2 and 1.

    Ended by signals in between, with exit code 75.
    """
    run = inputs / "elastic"
    recipe = write_recipe(inputs, "elastic.yaml", run=str(run), **CHANGES)
    disk = f"{{device: nvme, nvme_path: {inputs / 'disk'}}}"
    on_disk = [f"--set=zero.offload_{part}={disk}" for part in ("optimizer", "param")]
    ends = ((2, 3, 4, signal.SIGINT), (1, 0, 9, signal.SIGTERM), (4, 2, 14, signal.SIGUSR1))
    for processes, stage, until, number in ends:
        process = start(
            "train",
            str(recipe),
            f"--set=world.processes={processes}",
            f"--set=zero.stage={stage}",
            *(on_disk if stage == 3 else ()),
        )
        wait_until(lambda until=until: len(metrics(run)) >= until, process)  # type: ignore[misc]
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 75, output
        assert f"Stopped by {number.name}" in output
    done = bitdance("train", str(recipe), "--set", "zero.stage=1")
    assert done.returncode == 0, done.stdout
    assert [event["ranks"] for event in events(run, "started")] == [2, 1, 4, 2]
    for ours, theirs in zip(metrics(run), metrics(undisturbed), strict=True):
        for key in COMPUTED:
            assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-5 if key != "grad_norm" else 1e-4)


def test_finished_says_so_without_torch(undisturbed: Path) -> None:
    script = (
        "import sys; from bitdance import app\n"
        "try: app(['train', sys.argv[1]])\n"
        "except SystemExit as end: code = end.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'streaming'} & sys.modules.keys()\n"
        "sys.exit(code)"
    )
    recipe = undisturbed / "recipe.yaml"
    done = subprocess.run(
        [sys.executable, "-c", script, str(recipe)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is finished" in done.stdout


def test_another_recipe_is_refused_by_its_keys(undisturbed: Path) -> None:
    done = bitdance("train", str(undisturbed / "recipe.yaml"), "--set", "optimizer.lr=0.5")
    assert done.returncode == 78
    assert "optimizer.lr: 0.001 -> 0.5" in done.stdout and "Traceback" not in done.stdout


def test_the_next_stage_takes_the_export_and_grows_when_told(inputs: Path, undisturbed: Path) -> None:
    start_from = {"init_from": str(undisturbed / "export"), "p": 8, "random": None, "head": None}
    run = inputs / "next"
    recipe = write_recipe(inputs, "next.yaml", run=str(run), steps=2, model=start_from)
    refused = bitdance("train", str(recipe))
    assert refused.returncode == 78
    assert "model.grow_from: 4" in refused.stdout and "Traceback" not in refused.stdout
    assert not run.exists()  # nothing half-written
    done = bitdance("train", str(recipe), "--set", "model.grow_from=4")
    assert done.returncode == 0, done.stdout
    chain = bitdance("lineage", str(run)).stdout
    parent = json.loads((undisturbed / "export" / "export.json").read_text())
    assert f"from {undisturbed / 'export'}, step {STEPS}" in chain
    assert parent["lineage"]["dataset"]["manifest_sha256"][:12] in chain
    assert "from random weights" in chain
    assert_trained_from(undisturbed, run)


def test_the_next_stage_goes_on_from_the_weights_of_the_one_before(inputs: Path, undisturbed: Path) -> None:
    model = {"init_from": str(undisturbed / "export"), "p": 4, "random": None, "head": None}
    run = inputs / "same-p"
    done = bitdance("train", str(write_recipe(inputs, "same-p.yaml", run=str(run), steps=2, model=model)))
    assert done.returncode == 0, done.stdout
    assert_trained_from(undisturbed, run)


def assert_trained_from(before: Path, run: Path) -> None:
    """The export of ``run`` is that of ``before`` and two steps of Adam, which move a weight by no more than
    the learning rate each. Random weights would be far away; weights of the start would not have moved.
    """
    for name in ("model.safetensors", "vision_head.safetensors", "projector.safetensors"):
        old, new = (load_file(path / "export" / name) for path in (before, run))
        assert old.keys() == new.keys()
        # Growing has added rows to the vocabulary.
        moved = {key: (new[key][: len(old[key])] - old[key]).abs().max().item() for key in old}
        assert all(distance <= 2.1e-3 for distance in moved.values()), moved
        assert max(moved.values()) > 5e-4


def test_a_dataset_of_another_tokenizer_is_refused(inputs: Path, tmp_path: Path) -> None:
    make_inputs(tmp_path, bits=16)
    recipe = write_recipe(
        inputs,
        "mixed.yaml",
        run=str(inputs / "mixed"),
        data__latents=str(tmp_path / "latents"),
        world__processes=2,
    )
    done = bitdance("train", str(recipe))
    assert done.returncode == 65
    assert "Traceback" not in done.stdout
    # One message, though two ranks found it.
    assert done.stdout.count("fingerprint") == 1


def test_a_fault_that_one_rank_meets_is_the_only_one_told(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "latents", tmp_path / "latents")
    shard = min((tmp_path / "latents" / "tasks").glob("*/*/*.mds"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) * 3 // 4])
    damaged = {"data__latents": str(tmp_path / "latents"), "run": str(tmp_path / "run"), "steps": 40}
    done = bitdance("train", str(write_recipe(inputs, "damaged.yaml", world__processes=2, **damaged)))
    assert done.returncode == 65, done.stdout
    told = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert "Connection closed" not in done.stdout and "Traceback" not in done.stdout
    assert told and all(str(shard.name) in line for line in told)
