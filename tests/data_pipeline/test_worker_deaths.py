"""What kills workers at one shard fails that task alone, in all starts; the end of a whole job does not."""

import faulthandler
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from photo_shards import picture, tokenize_recipe, write_shards, write_tar, write_tokenizer

from data_pipeline.ingest.shards import Shard
from data_pipeline.manifest import TextTokenizerManifest, TokenizerManifest
from data_pipeline.status import clear_failures, give_up, read_status
from data_pipeline.tokenize import workers
from data_pipeline.tokenize.folder import DatasetFolder, Plan
from data_pipeline.tokenize.workers import work_here, work_in_processes
from data_pipeline.tokenize.workshop import MachineFails, WorkerDied, Workshop

TOKENIZER = TokenizerManifest(fingerprint="f", downsample=16, bits_per_token=16, dtype="float32", folder="t")
TEXT = TextTokenizerManifest(name="n", inside=False, vocab_size=9, sha256="s")


class Acting(Workshop):
    """Its tasks do what is written in a file of their number, and end well where there is none."""

    def __enter__(self):
        faulthandler.disable()  # pytest's would print a page at each crash
        if (word := self.written("start")) is not None:
            os.kill(os.getpid(), int(word))
        return self

    def written(self, name):
        path = Path(self.recipe.output).parent / name
        return path.read_text() if path.exists() else None

    def attempt(self, number):
        with open(Path(self.recipe.output).parent / "tried", "a") as file:
            file.write(f"{number}\n")
        match self.written(str(number)):
            case "no memory":
                raise WorkerDied("no memory was left")
            case "parent too":
                os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
            case str(word):
                os.kill(os.getpid(), int(word))
        return None


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs tasks, some of which end their worker as is told; those tried, and what each came to."""
    fork = multiprocessing.get_context("fork")  # starts at once
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(workers, "Workshop", Acting)
    monkeypatch.setattr(workers, "OWN_END_SECONDS", 0.0)
    recipe = tokenize_recipe(tmp_path)

    def run(tasks, processes=2, **words):
        plan = Plan(tuple(Shard(f"{i}.tar", 5) for i in range(tasks)), TOKENIZER, TEXT, None)
        folder = DatasetFolder(recipe.output)
        folder.write_plan(plan)
        missing = [i for i in range(tasks) if i not in folder.failures()]
        for name, word in words.items():
            (tmp_path / name.removeprefix("at")).write_text(str(int(word) if isinstance(word, int) else word))
        (tmp_path / "tried").unlink(missing_ok=True)
        found = dict(work_in_processes(recipe, plan, None, missing, processes))
        return sorted(map(int, (tmp_path / "tried").read_text().split())), found

    run.folder = DatasetFolder(recipe.output)
    return run


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize(
    ("end", "said"),
    [
        (signal.SIGKILL, r"signal 9, Killed \(probably out of memory: lower compute\.processes"),
        (signal.SIGSEGV, r"signal 11, Segmentation fault \(a library crashed, such as a decoder"),
        ("exit", "it ended with exit code 7"),
        ("no memory", "no memory was left"),
    ],
)
def test_a_shard_that_kills_two_workers_fails_and_the_others_are_done(job, capfd, processes, end, said):
    tried, found = job(5, processes, at1=end)
    assert tried == [0, 1, 1, 2, 3, 4]
    assert {number for number, reason in found.items() if reason is None} == {0, 2, 3, 4}
    assert found[1].startswith("1.tar: its worker died twice, the last time so: ")
    assert re.search(said, found[1])
    assert job.folder.failures()[1]["reason"] == found[1] and job.folder.deaths()[1]["deaths"] == 2
    assert "task 00001: 1.tar: its worker died, and another one will try again: " in capfd.readouterr().out
    assert multiprocessing.active_children() == []


def test_deaths_are_counted_across_starts_and_forgotten_by_retry(job):
    job.folder.note_death(1, Shard("1.tar", 5), "it was ended by signal 9")
    tried, found = job(3, 1, at1=signal.SIGKILL)
    assert tried == [0, 1, 2] and "died twice" in found[1]
    assert clear_failures(job.folder.root) == 1
    assert not job.folder.deaths() and not job.folder.failures()
    tried, _ = job(3, 1)
    assert tried == [0, 1, 1, 2]


def test_one_death_is_forgotten_by_retry_by_another_content_and_by_giving_up(job):
    shard = Shard("1.tar", 5)
    job.folder.write_plan(Plan((shard, shard), TOKENIZER, TEXT, None))
    assert [job.folder.note_death(1, s, "x") for s in (shard, shard, Shard("1.tar", 6))] == [1, 2, 1]
    edited = Shard("1.tar", 6, listing="of other names")
    assert [job.folder.note_death(1, s, "x") for s in (edited, edited)] == [1, 2]
    give_up(job.folder.root, [1])
    assert not job.folder.deaths()
    job.folder.note_death(0, shard, "x")
    assert clear_failures(job.folder.root) == 0 and not job.folder.deaths()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_that_is_told_to_end_is_no_shards_fault(job, end):
    with pytest.raises(MachineFails, match=f"signal {int(end)},.*the same command goes on") as error:
        job(3, at1=end)
    assert error.value.exit_code == 75
    assert not job.folder.deaths() and multiprocessing.active_children() == []


def test_ctrl_c_is_answered_by_the_parent_alone(job):
    tried, found = job(2, at1=signal.SIGINT)
    assert found == {0: None, 1: None} and tried == [0, 1]


def test_workers_that_die_before_their_first_task_end_the_job(job):
    with pytest.raises(MachineFails, match=r"had no task.*signal 11"):
        job(3, start=signal.SIGSEGV)
    assert not job.folder.deaths()


def test_workers_that_die_one_after_the_other_end_the_job(job, monkeypatch):
    """So many in a start; each start comes further, should it be the shards after all."""
    monkeypatch.setattr(workers, "DEATHS_IN_A_ROW", 3)
    deadly = {f"at{i}": signal.SIGKILL for i in range(4)}
    with pytest.raises(MachineFails, match=r"3 workers died one after the other.*it may be the machine"):
        job(5, 1, **deadly)
    assert len(job.folder.deaths()) == 3 and not job.folder.failures()
    with pytest.raises(MachineFails):
        job(5, 1)
    assert sorted(job.folder.failures()) == [0, 1, 2]
    tried, found = job(5, 1)
    assert tried == [3, 3, 4] and found[4] is None and "died twice" in found[3]


def test_the_death_of_the_whole_job_is_not_counted(job, monkeypatch):
    """Whoever kills all of it may reach the worker first."""
    monkeypatch.setattr(workers, "OWN_END_SECONDS", 1.0)
    parent = os.fork()
    if parent == 0:
        try:
            job(2, 1, at0="parent too")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(parent, 0)[1]) == signal.SIGKILL
    assert not job.folder.deaths()


def test_in_the_jobs_own_process_a_broken_pool_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Workshop", Acting)
    (tmp_path / "0").write_text("no memory")
    plan = Plan((Shard("0.tar", 5),), TOKENIZER, TEXT, None)
    with pytest.raises(WorkerDied, match=r"0\.tar: no memory.*compute\.processes above 0") as error:
        list(work_here(tokenize_recipe(tmp_path), plan, None, [0]))
    assert error.value.exit_code == 75


CRASHING = """
import os, signal
import PIL.Image

def crash(file, *arguments, real=PIL.Image.open, **more):
    if b"crash here" in file.getvalue():
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(file, *arguments, **more)

PIL.Image.open = crash
"""


@pytest.mark.long
@pytest.mark.parametrize("decoders", [0, 1])
def test_a_picture_that_crashes_its_decoder_fails_its_task_in_a_real_job(tmp_path, decoders):
    write_shards(tmp_path / "shards", 3)
    deadly = [("a.jpg", picture(1, 64, 64) + b"crash here"), ("a.txt", b"a picture of number 1 in a frame")]
    write_tar(tmp_path / "shards" / "00001.tar", deadly)
    write_tokenizer(tmp_path / "tokenizer")
    recipe = tokenize_recipe(tmp_path, compute={"decoders": decoders})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    (tmp_path / "sitecustomize.py").write_text(CRASHING)
    command = [sys.executable, "-m", "bitdance", "data", "tokenize", str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for starts in (1, 2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 65, done.stderr
        assert "00001.tar: its worker died twice" in done.stderr and "Traceback" not in done.stderr
        assert ("another one will try again" in done.stdout) == (starts == 1)
    status = read_status(tmp_path / "latents")
    assert status.done == 2 and list(status.failed) == [1]
    write_tar(tmp_path / "shards" / "00001.tar", [("a.jpg", picture(1, 64, 64)), deadly[1]])
    assert clear_failures(tmp_path / "latents") == 1
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert read_status(tmp_path / "latents").finished and not list(
        (tmp_path / "latents" / "died").glob("*.json")
    )
