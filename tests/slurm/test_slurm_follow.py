"""`bitdance jobs`, `logs` and `cancel` of runs and datasets, wherever these are; no cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import write_commands
from typer.testing import CliRunner

from foundation.errors import DataError
from slurm import follow
from slurm.cli import app
from slurm.controller import ControllerAway
from slurm.history import JobFolder
from trainer.run_folder import RunFolder

STORE = "s3://bucket/more/latents"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobFolder]:
    """The traces of an array and of what finishes its dataset, which is in a store; no Slurm is here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = JobFolder.beside(STORE)
    folder.note("submitted", 11, after=None)
    folder.note("submitted", 12, after=11)
    (folder.path / "recipe.yaml").write_text(f"output: {STORE}\n")
    return folder


def logs(*arguments: str) -> str:
    """What `bitdance logs` prints, or says in refusal."""
    result = CliRunner().invoke(app, ["logs", *arguments])
    return str(result.exception) if isinstance(result.exception, DataError) else result.stdout


def test_the_log_of_a_dataset_in_a_store(remote: JobFolder) -> None:
    assert logs(STORE).startswith(
        "data/bucket/more/latents.slurm holds no log of job 11 or 12: the job has not"
    )
    (remote.path / "11_3.log").write_text("three\n")
    for name in (STORE, f"{STORE}/", "data/bucket/more/latents"):
        assert logs(name) == "three\n"
    assert logs(STORE, "--rank", "0") == f"{STORE}: a data job has no ranks; leave --rank out"


def test_the_log_of_a_rank_that_the_run_has_not(tmp_path: Path) -> None:
    folder, run = JobFolder.of_run(tmp_path), RunFolder(tmp_path)
    folder.note("submitted", 7)
    assert "the job has not started yet" in logs(str(tmp_path), "--rank", "9")
    run.logs.mkdir()
    for rank in (0, 1):
        (run.logs / f"rank-{rank}.log").write_text("said\n")
    assert logs(str(tmp_path), "--rank", "1") == "said\n"
    assert logs(str(tmp_path), "--rank", "9").endswith("does not exist: the run's ranks are 0, 1")


def test_what_was_never_submitted_is_said_with_where_it_was_looked_for(remote: JobFolder) -> None:
    assert logs("s3://bucket/other") == (
        "s3://bucket/other was never submitted from here: there is no data/bucket/other.slurm/history.jsonl"
    )
    assert logs("runs/a").endswith("no runs/a/slurm/history.jsonl nor runs/a.slurm/history.jsonl")


def test_a_dataset_in_a_store_is_told_by_its_address(
    remote: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be away; what is known of its job is told all the same."""
    asked: list[str] = []

    def away(dataset: str) -> None:
        asked.append(dataset)
        raise DataError("away")

    monkeypatch.setattr(follow, "read_status", away)
    (row,) = follow.rows([Path("data")], {})
    assert (row.path, row.job, row.progress) == (STORE, "12", "") and asked == [STORE]
    (remote.path / "recipe.yaml").unlink()
    (row,) = follow.rows([Path("data")], {})
    assert row.path == os.path.join("data", "bucket", "more", "latents")


def test_a_job_on_a_dataset_in_a_store_is_cancelled(
    remote: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(follow, "all_jobs", lambda: {job: [{"JobState": "PENDING"}] for job in (11, 12)})
    monkeypatch.setattr(follow, "slurm", lambda *command: told.append(command))
    assert CliRunner().invoke(app, ["cancel", STORE]).exit_code == 0
    assert told == [("scancel", "11"), ("scancel", "12")]


@pytest.mark.parametrize(
    ("jobs", "why"),
    [
        ([{"JobState": "CANCELLED", "Reason": "DependencyNeverSatisfied"}], "the job before it has failed"),
        ([{"JobState": "CANCELLED", "Reason": "BeginTime", "ExitCode": "0:15"}], ""),
        ([{"JobState": "PENDING", "Reason": "QOSMaxNodePerUserLimit"}], "a limit of its QOS is reached"),
        ([{"JobState": "PENDING", "Reason": "AssocGrpGRES"}], "a limit of its account is reached"),
        ([{"JobState": "PENDING", "Reason": "Unheard"}], "see `man squeue`"),
        ([{"JobState": "RUNNING", "Reason": "None"}], ""),
        ([{"JobState": "FAILED", "Reason": "NonZeroExitCode", "ExitCode": "65:0"}], "the data are bad"),
        ([{"JobState": "FAILED", "ExitCode": "2:0"}], "the command line is wrong"),
        (
            [{"JobState": "FAILED", "ExitCode": "78:0"}],
            "a bad recipe, or no working Python on three nodes; see its log",
        ),
        ([{"JobState": "FAILED", "ExitCode": "0:9"}], "a process was ended by SIGKILL"),
        (
            [
                {"JobState": "COMPLETED", "ExitCode": "0:0"},
                {"JobState": "RUNNING"},
                {"JobState": "FAILED", "ExitCode": "70:0"},
                {"JobState": "FAILED", "ExitCode": "70:0"},
                {"JobState": "PENDING", "Reason": "JobArrayTaskLimit"},
            ],
            "exit code 70; JobArrayTaskLimit: as many of its tasks run as may at a time (ARRAY_AT_ONCE)",
        ),
    ],
)
def test_why_is_of_the_job_that_is_told(tmp_path: Path, jobs: list[dict[str, str]], why: str) -> None:
    """Not of an earlier one, and not of a start after which the job went on."""
    folder = JobFolder.of_run(tmp_path / "run")
    folder.note("end", 6, why="of an earlier job", again=False)
    folder.note("submitted", 7)
    folder.note("end", 7, why="saved, wants to go on", again=True)
    known = {7: [{"UserId": "another(7)"} | job for job in jobs]}
    (row,) = follow.rows([tmp_path], known)
    reason = f"{jobs[0].get('Reason')}: "
    assert row.why.removeprefix(reason) == why


def test_what_a_job_has_noted_of_its_end_is_told(tmp_path: Path) -> None:
    """And no time left: it has ended."""
    folder = JobFolder.of_run(tmp_path / "run")
    folder.note("submitted", 7)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5, "eta_seconds": 60}\n')
    known = {7: [{"JobState": "RUNNING", "UserId": "another(7)"}]}
    (row,) = follow.rows([tmp_path], known)
    assert (row.left, row.why) == ("1 min 00 s", "")
    ended = {"again": False, "code": 75, "nodes": "n1", "restart": 0}
    folder.note("end", 7, why="cancelled, as asked; step 4 is saved", **ended)
    folder.note("cancel", 7)
    known[7][0] |= {"JobState": "CANCELLED", "ExitCode": "0:15"}
    for now in (known, {}):  # in Slurm's memory, and in its own alone
        (row,) = follow.rows([tmp_path], now)
        assert (row.left, row.state, row.why) == ("", "cancelled", "cancelled, as asked; step 4 is saved")


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that was submitted; the controller does not answer Slurm's commands."""
    write_commands(tmp_path / "bin")
    (tmp_path / "bin" / "scontrol").write_text(
        "#!/bin/sh\necho 'slurm_load error: Unable to contact' >&2\nexit 1\n"
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    JobFolder.of_run(tmp_path / "run").note("submitted", 7)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5, "eta_seconds": 60}\n')
    return tmp_path


def test_jobs_tells_what_it_knows_without_the_controller(away: Path) -> None:
    result = CliRunner().invoke(app, ["jobs", str(away)])
    assert isinstance(result.exception, ControllerAway) and result.exception.exit_code == 75
    said = str(result.exception)
    assert said.startswith(
        "Slurm's controller does not answer (scontrol: Unable to contact): try again when it"
    )
    (row,) = [line for line in result.stdout.splitlines() if str(away) in line]
    assert "unknown" in row and "0.5000" in row


def test_nothing_is_cancelled_without_the_controller(away: Path) -> None:
    result = CliRunner().invoke(app, ["cancel", str(away / "run")])
    assert isinstance(result.exception, ControllerAway)
    assert not JobFolder.of_run(away / "run").lines("cancel")


def test_a_cancel_that_slurm_has_not_taken_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job would end at its next restart."""
    history, answers = JobFolder.of_run(tmp_path), [ControllerAway("gone"), ""]

    def slurm(*command: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, ControllerAway):
            raise answer
        return answer

    monkeypatch.setattr(follow, "slurm", slurm)
    monkeypatch.setattr(follow, "all_jobs", dict)
    monkeypatch.setattr(follow, "live_jobs", lambda folder, known: {7: [{"JobState": "PENDING"}]})
    history.note("submitted", 7)
    with pytest.raises(ControllerAway):
        follow.cancel(tmp_path, 0)
    assert not history.is_cancelled(7)
    follow.cancel(tmp_path, 0)
    assert history.is_cancelled(7) and not history.is_cancelled(8)


def test_a_save_is_waited_for_though_the_controller_goes_away(
    away: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[object] = [ControllerAway("gone"), [{"JobState": "RUNNING"}], []]

    def live(number: int) -> object:
        answer = answers.pop(0)
        if isinstance(answer, ControllerAway):
            raise answer
        return answer

    monkeypatch.setattr(follow, "live", live)
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: None)
    follow._wait_for_the_end(7, RunFolder(away / "run"), 60)
    assert "job 7 has ended" in capsys.readouterr().out and not answers
