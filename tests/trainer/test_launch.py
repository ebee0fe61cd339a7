import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from small_stage import write_recipe

import trainer.launch
from foundation.errors import ExitCode, RecipeError
from foundation.recipes import load_recipe
from trainer.launch import _patience, _Signals, _verdict, launch, started_as_rank
from trainer.rank import distributed_variables
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder
from trainer.signals import STOP_SIGNALS


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [  # by rank, in the order in which they ended
        ({0: 0, 1: 0}, ExitCode.DONE),
        ({0: 75, 1: 75}, ExitCode.REQUEUE),
        ({0: 78, 1: -9}, ExitCode.RECIPE),
        ({1: -9, 0: 78}, ExitCode.RECIPE),
        ({0: 65, 1: 70}, ExitCode.DATA),
        ({0: 70, 1: -15}, ExitCode.BUG),
        ({0: 70, 1: -9}, ExitCode.BUG),
        ({1: -9, 0: 70}, ExitCode.REQUEUE),
        ({2: 75, 1: -9, 0: 70, 3: -9}, ExitCode.REQUEUE),
        ({0: -9, 1: 0}, ExitCode.REQUEUE),
        ({0: 3, 1: 0}, ExitCode.BUG),
        ({1: 0, 0: 3}, ExitCode.BUG),
    ],
)
def test_one_exit_code_for_all_ranks(tmp_path: Path, ends: dict[int, int], verdict: ExitCode) -> None:
    assert _verdict(ends, RunFolder(tmp_path)) == verdict


def ends_of_ranks(recipe: StageRecipe, monkeypatch: pytest.MonkeyPatch, *scripts: str) -> ExitCode:
    """`launch` with shell scripts for ranks."""
    monkeypatch.setattr(
        trainer.launch, "_start_rank", lambda _, rank, *rest: subprocess.Popen(["sh", "-c", scripts[rank]])
    )
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        return launch(recipe, [])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_rank_that_is_killed_is_no_bug_of_those_that_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(tmp_path, world__processes=2))
    assert ends_of_ranks(recipe, monkeypatch, "sleep 0.2; exit 70", "kill -9 $$") == ExitCode.REQUEUE
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Rank 1 was ended by SIGKILL") and "rank-1.log; the same command goes on" in line
    assert ends_of_ranks(recipe, monkeypatch, "exit 70", "sleep 0.2; kill -9 $$") == ExitCode.BUG
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ends", "copies", "seconds"),
    [
        ({1: 70}, False, 10.0),
        ({1: 75}, False, 70.0),
        ({1: 75}, True, math.inf),  # rank 0 is copying what was saved
        ({1: 75, 0: 75}, True, 70.0),  # it goes last
        ({1: 75, 2: -9}, True, 10.0),
        ({1: 0}, False, math.inf),  # rank 0 makes the last pictures, and copies
        ({0: 0}, False, 70.0),
    ],
)
def test_how_long_a_rank_may_stay_when_others_have_ended(
    ends: dict[int, int], copies: bool, seconds: float
) -> None:
    assert _patience(ends, copies) == seconds


@pytest.mark.parametrize(
    ("left", "verdict"), [(75, ExitCode.REQUEUE), (0, ExitCode.DONE), (65, ExitCode.DATA)]
)
def test_a_rank_that_cannot_end_itself_is_killed_and_the_exit_code_is_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    left: int,
    verdict: ExitCode,
) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(tmp_path, world__processes=2))
    for grace in ("GRACE_SECONDS", "LEAVE_SECONDS"):
        monkeypatch.setattr(trainer.launch, grace, 0.1)
    began = time.monotonic()
    assert ends_of_ranks(recipe, monkeypatch, f"exit {left}", "trap '' TERM; exec sleep 60") == verdict
    assert time.monotonic() - began < 30
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Killed what did not end") and "logs/rank-1.log" in line


def test_a_rank_that_the_kernel_cannot_end_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(tmp_path, world__processes=2))
    for grace in ("GRACE_SECONDS", "LEAVE_SECONDS", "KILLED_SECONDS"):
        monkeypatch.setattr(trainer.launch, grace, 0.1)
    stuck: list[subprocess.Popen[bytes]] = []
    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "kill", lambda rank: stuck.append(rank))
        assert ends_of_ranks(recipe, monkeypatch, "exit 75", "exec sleep 60") == ExitCode.REQUEUE
    for rank in stuck:
        rank.kill()
        rank.wait()
    assert len(stuck) == 1


def test_ranks_are_told_by_their_environment() -> None:
    assert started_as_rank({"RANK": "0", "WORLD_SIZE": "2"})
    assert started_as_rank({"SLURM_PROCID": "3", "MASTER_ADDR": "node1"})
    # A batch script's own shell has SLURM_PROCID too, but is no rank.
    assert not started_as_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"})
    assert not started_as_rank({})


def test_a_signal_is_answered_once_and_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signals = _Signals([])
        signals.tell()
        assert capsys.readouterr().out == ""
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            signals.tell()
        assert not signals.impatient
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("SIGTERM: stopping; the ranks save at the end of their step")
        os.kill(os.getpid(), signal.SIGINT)
        signals.tell()
        assert signals.impatient and capsys.readouterr().out == ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_standard_output_that_nobody_reads_does_not_end_the_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert _verdict({0: -9, 1: 75}, RunFolder(tmp_path)) == ExitCode.REQUEUE
        assert sys.stdout is not full
        with suppress(OSError):
            full.close()


def test_srun_is_translated_and_what_is_missing_is_named() -> None:
    slurm = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    found = distributed_variables(slurm | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    with pytest.raises(RecipeError, match="MASTER_PORT"):
        distributed_variables(slurm | {"MASTER_ADDR": "node1"})
