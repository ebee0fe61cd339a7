"""What a job and its submission find around them: a shell, groups, a busy controller, a site file."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from foundation.errors import ExitCode, Problems, RecipeError
from slurm import after, checks, controller
from slurm.after import Decision, Start, decide, run_again
from slurm.controller import ControllerAway, SlurmError, patiently
from slurm.history import JobFolder
from slurm.script import SCRIPTS
from slurm.site import Site, read_site
from slurm.start import of_srun
from trainer.rank import distributed_variables
from trainer.run_folder import RunFolder


def test_the_submitters_ranks_are_not_the_jobs() -> None:
    shell = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    environment = shell | srun | {"MASTER_ADDR": "n1", "MASTER_PORT": "15000"}
    found = distributed_variables(environment | of_srun(environment))
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("3", "4", "1")


def test_the_submitters_own_job_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `salloc` or a notebook; what tells Slurm's commands where the cluster is stays."""
    foreign = ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_NTASKS_PER_NODE", "SLURM_CPU_BIND")
    for name in (*foreign, "SLURMD_NODENAME", "SLURM_CONF", "SLURM_JWT", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nenv\n")
    sbatch.chmod(0o755)
    handed_on = {line.partition("=")[0] for line in controller.slurm(str(sbatch)).splitlines()}
    assert handed_on >= {"SLURM_CONF", "SLURM_JWT", "SBATCH_ACCOUNT", "PATH"}
    assert not handed_on & {*foreign, "SLURMD_NODENAME"}


def test_a_folder_without_locks_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some network file systems have none: two submissions of a run could not be kept apart."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = JobFolder.of_run(tmp_path)
    with (
        pytest.raises(RecipeError, match=r"slurm/lock cannot be locked \(No locks available\)"),
        folder.held(),
    ):
        pass


def test_a_percent_sign_of_a_folder_is_no_pattern(tmp_path: Path) -> None:
    """sbatch would put the job's name in its place."""
    folder = JobFolder.of_run(tmp_path / "lr%x-50%")
    assert folder.log_pattern("%j.log") == f"{tmp_path.resolve()}/lr%%x-50%%/slurm/%j.log"


@pytest.mark.parametrize(("allowed", "complaints"), [("ALL", 0), ("staff", 1)])
def test_a_group_without_a_name(monkeypatch: pytest.MonkeyPatch, allowed: str, complaints: int) -> None:
    monkeypatch.setattr(os, "getgroups", lambda: [4_000_000_001])
    problems = Problems()
    partition = {"PartitionName": "main", "State": "UP", "AllowGroups": allowed}
    checks._check_permission(problems, Site(), partition)
    assert len(problems.lines) == complaints


@pytest.mark.parametrize(
    "said",
    [
        "scontrol: Unable to contact slurm controller (connect failure)",
        "slurm_update error: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
    ],
)
def test_a_controller_that_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/back ] && echo JobId=7 || {{ echo '{said}' >&2; exit 1; }}\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setattr(controller.time, "sleep", lambda seconds: (tmp_path / "back").touch())
    with pytest.raises(ControllerAway):
        patiently(-1, str(scontrol))
    assert patiently(60, str(scontrol)) == "JobId=7\n"
    scontrol.write_text("#!/bin/sh\necho 'Invalid job id specified' >&2; exit 1\n")
    with pytest.raises(SlurmError, match="Invalid job id"):
        patiently(60, str(scontrol))


def test_a_bad_node_stays_out_though_the_answer_to_the_requeue_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller has done it; to the repetition it says that there is nothing to do."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"""#!/bin/bash
[ $1 = requeue ] || {{ echo "$*" > {tmp_path}/told; exit; }}
said="Job is pending execution for job 7"
[ -e {tmp_path}/asked ] || said="Socket timed out on send/recv operation"
touch {tmp_path}/asked
echo "$said" >&2
exit 1
"""
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(controller.time, "sleep", lambda seconds: None)
    decision = Decision(True, ExitCode.REQUEUE, "no disk", without=("n2",))
    run_again(Start(7, 0, "n[1-2]", 75, "7"), {"ExcNodeList": "(null)"}, decision)
    assert (tmp_path / "told").read_text() == "update JobId=7 ExcNodeList=n2\n"


def test_a_finished_stage_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller may be away for an hour then; of a finished command it is asked once, for its traces."""
    asked: list[float] = []

    def away(seconds: float, *command: str) -> str:
        asked.append(seconds)
        raise ControllerAway("away")

    monkeypatch.setattr(after, "patiently", away)
    monkeypatch.setattr(after.signal, "signal", lambda *of: None)
    monkeypatch.setattr(RunFolder, "finished_at", lambda self: 6)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.yaml").write_text(f"run: {tmp_path}/run\n")
    assert after.main([str(tmp_path / "recipe.yaml"), "--code", "0"]) == 0 and not asked
    (line,) = JobFolder.of_run(tmp_path / "run").lines("end")
    assert (line["why"], line["code"]) == ("finished", 0)
    assert after.main(["--code", "0"]) == 0 and asked == [0]
    assert after.main(["--code", "1"]) == 75 and asked[1] > 1000


@pytest.mark.parametrize(("step", "saved"), [(None, "nothing is saved yet"), (5, "step 5 is saved")])
def test_what_a_cancelled_run_has_saved_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None, saved: str
) -> None:
    """The ranks have left in peace, but maybe before there was anything to save."""
    told = list[tuple[str, ...]]()

    def slurm(seconds: float, *command: str) -> str:
        told.append(command)
        return "JobId=7 JobState=RUNNING Restarts=0"

    monkeypatch.setattr(after, "patiently", slurm)
    monkeypatch.setattr(after.signal, "signal", lambda *of: None)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.yaml").write_text(f"run: {tmp_path}/run\n")
    run, history = RunFolder(tmp_path / "run"), JobFolder.of_run(tmp_path / "run")
    history.note("cancel", 7)
    if step is not None:
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
        (run.checkpoints / f"step-{step}" / "manifest.json").touch()
    assert after.main([str(tmp_path / "recipe.yaml"), "--code", "0"]) == ExitCode.REQUEUE
    (line,) = history.lines("end")
    assert (line["why"], line["again"], line["step"]) == (f"cancelled, as asked; {saved}", False, step or 0)
    assert told[-1] == ("scancel", "7")


def test_wrong_usage_is_not_tried_again(tmp_path: Path) -> None:
    """Of a command, and of a stage."""
    for run, history in ((None, None), (RunFolder(tmp_path), JobFolder.of_run(tmp_path))):
        decision = decide(Start(7, 0, "n1", 2), "", run, history)
        assert (decision.again, decision.code, decision.why) == (False, 2, "the command line is wrong")


def test_of_two_jobs_on_a_run_one_ends(tmp_path: Path) -> None:
    """Job 7 has been fenced by job 8. Whoever has not begun yet takes the run from the one before."""
    run, history = RunFolder(tmp_path), JobFolder.of_run(tmp_path)
    run.starts.mkdir()
    history.note("start", 7)
    assert decide(Start(8, 0, "n1", 75), "", run, history).again
    history.note("start", 8)
    for code in (75, 70, 137):
        decision = decide(Start(7, 0, "n1", code), "", run, history)
        assert (decision.again, decision.code) == (False, ExitCode.RECIPE)
        assert decision.why == "job 8 trains this run"
        assert decide(Start(8, 0, "n1", code), "", run, history).again
    assert decide(Start(7, 0, "n1", 0), "", run, history).code == ExitCode.DONE


def test_a_controller_that_says_nothing_at_all_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "ANSWER_SECONDS", 0.1)
    with pytest.raises(ControllerAway, match="sleep has had no answer"):
        controller.slurm("sleep", "5")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('PREFLIGHT_OPTIONS="--min-disk-bg 2"', "unrecognized arguments: --min-disk-bg 2"),
        ('PREFLIGHT_OPTIONS="--patience long"', "argument --patience: invalid float value: 'long'"),
        ('SBATCH_OPTIONS="-C h100"', "-C is no --name or --name=value"),
        ('SBATCH_OPTIONS="--constraint h100"', "h100 is no --name or --name=value"),
        ("PYTHON=$HOME/python", "PYTHON: $HOME/python is not taken literally by bash"),
        ("PYTHON=~/python", "PYTHON: ~/python is not taken literally by bash"),
        ('PARTITION="`which`"', "PARTITION: `which` is not taken literally by bash"),
        ("SRUN_OPTIONS=--a --b", "SRUN_OPTIONS: bash reads an unquoted blank as the end of a value"),
        ("PARTITION= gpu", "PARTITION: bash reads an unquoted blank as the end of a value"),
        ("export PARTITION=gpu", "PARTITION: it does not stand at the beginning of its line"),
    ],
)
def test_a_site_file_that_would_be_read_otherwise_is_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "site.env"
    path.write_text(f"ACCOUNT=a\n{line}\n")
    with pytest.raises(RecipeError) as refused:
        read_site(path)
    assert f"{path}:2: " in str(refused.value) and words in str(refused.value)


def test_a_site_file_that_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "site.env"
    path.write_text(
        "QOS=\nSRUN_OPTIONS='--a --b'  # c d\nPREFLIGHT_OPTIONS=\"--patience 9 --min-disk-gb=3\"\n"
        'SBATCH_OPTIONS="--exclusive --constraint=h100"\nexport HF_HOME=$HOME/hf\nif x; then\n  A=$B c\nfi\n'
    )
    assert read_site(path).site == Site(
        srun_options="--a --b",
        preflight_options="--patience 9 --min-disk-gb=3",
        sbatch_options="--exclusive --constraint=h100",
    )
    example = (SCRIPTS / "site.example.env").read_text()
    path.write_text("\n".join(line.removeprefix("#") for line in example.splitlines() if "=" in line[:20]))
    assert read_site(path).site.preflight_options.startswith("--min-disk-gb 20 ")
