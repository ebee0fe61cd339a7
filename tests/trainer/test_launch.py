import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from foundation.errors import ExitCode, RecipeError
from trainer.launch import _Signals, _verdict, started_as_rank
from trainer.rank import distributed_variables
from trainer.run_folder import RunFolder
from trainer.signals import STOP_SIGNALS


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ([0, 0], ExitCode.DONE),
        ([75, 75], ExitCode.REQUEUE),
        ([78, -9], ExitCode.RECIPE),
        ([65, 70], ExitCode.DATA),
        ([70, -15], ExitCode.BUG),
        ([-9, 0], ExitCode.REQUEUE),
        ([3, 0], ExitCode.BUG),
    ],
)
def test_one_exit_code_for_all_ranks(tmp_path: object, codes: list[int], verdict: ExitCode) -> None:
    assert _verdict(codes, RunFolder(tmp_path)) == verdict  # type: ignore[arg-type]


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
        assert _verdict([-9, 75], RunFolder(tmp_path)) == ExitCode.REQUEUE
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
