"""A download that is killed leaves nobody behind; the same command, at once, ends with each picture once."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
from small_web import download_recipe, need_tool, serving, write_rows

from data_pipeline.download import run
from data_pipeline.download.shards import STATS, complete_shards, forget_damaged
from data_pipeline.download.tool import DownloadStopped
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.shards import list_shards, read_shard
from foundation.errors import RecipeError
from foundation.files import open_locked
from foundation.json_files import read_json

ROOT = Path(__file__).parents[2]
JOB = """
import sys
from data_pipeline.download import run
from data_pipeline.download.recipe import DownloadRecipe
if sys.argv[2] == "stub":  # beside our own libraries, found by PYTHONPATH
    run.tool_command, run.find_uv = lambda uv: [sys.executable], lambda: "uv"
run.run_download(DownloadRecipe.model_validate_json(sys.argv[1]))
"""
# In place of the tool: worker processes that say who they are, and work for a minute.
STUB = """
import multiprocessing, os, time
def work(folder):
    open(f"{folder}/worker-{os.getpid()}", "w").close()
    time.sleep(60)
def download(output_folder, processes_count, **_):
    os.makedirs(output_folder, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(processes_count) as pool:
        pool.map(work, [output_folder] * processes_count, chunksize=1)
"""


@pytest.fixture
def start():
    """Starts jobs; none of them outlives its test."""
    jobs = []

    def start_job(recipe, log, tool="real", **environment):
        command = [sys.executable, "-c", JOB, recipe.model_dump_json(), tool]
        with open(log, "w") as file:
            variables = os.environ | environment
            jobs.append(
                subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=variables)
            )
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()
        job.wait()


def wait_until(true, what, seconds=120.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def lives(pid):
    """Whether a process does anything still; one that nobody has asked for its exit code does not."""
    try:
        return not re.search(r"\nState:\t[ZX]", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_in(folder):
    return {int(path.name.removeprefix("worker-")) for path in folder.glob("worker-*")}


def test_the_tool_dies_with_its_job_and_the_next_waits_for_its_last_process(tmp_path, start):
    (tmp_path / "img2dataset.py").write_text(STUB)
    write_rows(tmp_path, ["https://a.example/1.jpg"])
    recipe = download_recipe(tmp_path, compute={"processes": 2, "threads": 1})
    shards, log = tmp_path / "images" / "shards", tmp_path / "second.log"
    first = start(recipe, tmp_path / "first.log", "stub", PYTHONPATH=str(tmp_path))
    wait_until(lambda: len(workers_in(shards)) == 2, "the first job's workers")
    workers = workers_in(shards)
    second = start(recipe, log, "stub", PYTHONPATH=str(tmp_path))
    wait_until(lambda: "waiting" in log.read_text(), "the second job waits")
    assert f"process {first.pid} on " in log.read_text() and workers_in(shards) == workers
    first.kill()
    wait_until(lambda: len(workers_in(shards)) == 4, "the second job's workers")
    assert not any(map(lives, workers))
    second.terminate()
    assert second.wait() == -signal.SIGTERM
    open_locked(tmp_path / "images" / "lock", "r", fcntl.LOCK_EX).close()
    assert not any(map(lives, workers_in(shards)))


def test_a_worker_alone_keeps_the_lock(tmp_path, start):
    """The kernel may take its time to end a killed worker, one that waits for a disk: nobody else begins."""
    stub = STUB.replace("time.sleep(60)", "signal.pause()").replace("import ", "import ctypes, signal, ", 1)
    # This one is not killed with its parent.
    (tmp_path / "img2dataset.py").write_text(
        stub.replace("    open(", "    ctypes.CDLL(None).prctl(1, 0)\n    open(", 1)
    )
    write_rows(tmp_path, ["https://a.example/1.jpg"])
    shards, lock = tmp_path / "images" / "shards", tmp_path / "images" / "lock"
    job = start(download_recipe(tmp_path), tmp_path / "log", "stub", PYTHONPATH=str(tmp_path))
    wait_until(lambda: workers_in(shards), "the worker")
    (worker,) = workers_in(shards)
    job.kill()
    job.wait()
    try:
        with pytest.raises(BlockingIOError):
            open_locked(lock, "r", fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(worker, signal.SIGKILL)
    open_locked(lock, "r", fcntl.LOCK_EX).close()


def begin_between(monkeypatch, other):
    """Have another job begin the same folder while this one is about to."""
    commit = run.commit_folder

    def commit_second(partial, output):
        monkeypatch.setattr(run, "commit_folder", commit)
        other()
        commit(partial, output)

    monkeypatch.setattr(run, "commit_folder", commit_second)


def test_two_jobs_that_begin_together_make_one_folder(tmp_path, monkeypatch):
    """The second to finish it goes on with the first one's, as far as that is of the same recipe and rows."""
    monkeypatch.setattr(run, "tool_command", lambda uv: ["false"])
    monkeypatch.setattr(run, "find_uv", lambda: "uv")
    write_rows(tmp_path, ["https://a.example/1.jpg"])
    recipe = download_recipe(tmp_path)

    def end_without_tool(recipe=recipe):
        with pytest.raises(DownloadStopped, match="0 of 1 shards"):
            run.run_download(recipe)

    begin_between(monkeypatch, end_without_tool)
    end_without_tool()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "kept.parquet"]
    shutil.rmtree(tmp_path / "images")
    begin_between(monkeypatch, lambda: end_without_tool(download_recipe(tmp_path, samples_per_shard=7)))
    with pytest.raises(RecipeError, match="another recipe"):
        run.run_download(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "kept.parquet"]


def write_shard(folder, number, sizes=(700,)):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for place, size in enumerate(sizes):
            member = tarfile.TarInfo(f"{place}.jpg")
            member.size = size
            tar.addfile(member, BytesIO(b"x" * size))
    (folder / f"{number:05d}_stats.json").write_text(str(dict.fromkeys(STATS, 0)).replace("'", '"'))


def test_a_shard_is_complete_when_its_tar_has_its_end(tmp_path, capsys):
    """Cut before its end mark is whole, it is fetched again; so is one that lacks a file, or half of it."""
    for number, sizes in enumerate([(700,), (), (512,)]):
        write_shard(tmp_path, number, sizes)
    assert len(complete_shards(tmp_path, 3)) == 3
    tar = tmp_path / "00000.tar"
    whole, end = tar.read_bytes(), 512 + 1024 + 1024
    for length in (0, 1, *range(500, end, 20), end - 512, end - 1):
        tar.write_bytes(whole[:length])
        assert len(complete_shards(tmp_path, 3)) == 2, length
    tar.write_bytes(whole[:end])
    assert len(complete_shards(tmp_path, 3)) == 3
    (tmp_path / "00001.tar").unlink()
    stats = tmp_path / "00002_stats.json"
    stats.write_text(stats.read_text()[:-5])
    forget_damaged(tmp_path, 3)
    assert len(complete_shards(tmp_path, 3)) == 1
    assert [path.name for path in tmp_path.glob("*_stats.json")] == ["00000_stats.json"]
    assert capsys.readouterr().out.count("fetched again") == 2


@pytest.mark.long
def test_a_download_killed_again_and_again_ends_with_every_picture_once(tmp_path, start):
    """By the real tool: three jobs are killed while pictures come in, each is started again at once."""
    need_tool()
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    with serving() as server:
        urls = [f"{server.address}/slow{number}.jpg" for number in range(160)]
        write_rows(tmp_path, urls)
        patient = {"stall_seconds": 60, "total_seconds": 60.0}  # every picture is to come
        work = {"processes": 2, "threads": 2}
        recipe = download_recipe(tmp_path, samples_per_shard=12, compute=work, limits=patient)
        for number, signal_number in enumerate(signals):
            job, asked = start(recipe, tmp_path / f"{number}.log"), len(server.seen)
            wait_until(lambda before=asked: len(server.seen) > before + 30, "pictures are asked for")
            job.send_signal(signal_number)
            assert job.wait() == -signal_number
        last = start(recipe, tmp_path / "last.log")
        assert last.wait(timeout=300) == 0, (tmp_path / "last.log").read_text()
        assert "Traceback" not in "".join(log.read_text() for log in tmp_path.glob("*.log"))
        # What is asked for twice are the shards that were under way: two each time.
        assert len(server.seen) <= len(urls) + len(signals) * 2 * 12
    assert read_json(tmp_path / "images" / "download.json", "")["success"] == len(urls)
    section = InputSection(path=[str(tmp_path / "images" / "shards")])
    samples = [sample for shard in list_shards(section) for sample in read_shard(shard, section)]
    assert sorted(sample.fields["url"] for sample in samples) == sorted(urls)
