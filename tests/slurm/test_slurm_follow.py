"""`bitdance jobs`, `logs` and `cancel` of runs and datasets, wherever these are; no cluster."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foundation.errors import DataError
from slurm import follow
from slurm.cli import app
from slurm.history import JobFolder

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
    (row,) = follow.rows([Path("data")])
    assert (row.path, row.job, row.progress) == (STORE, "12", "") and asked == [STORE]
    (remote.path / "recipe.yaml").unlink()
    (row,) = follow.rows([Path("data")])
    assert row.path == os.path.join("data", "bucket", "more", "latents")


def test_a_job_on_a_dataset_in_a_store_is_cancelled(
    remote: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(follow, "live", lambda number: [{"JobState": "PENDING"}])
    monkeypatch.setattr(follow, "slurm", lambda *command: told.append(command))
    assert CliRunner().invoke(app, ["cancel", STORE]).exit_code == 0
    assert told == [("scancel", "11"), ("scancel", "12")]
