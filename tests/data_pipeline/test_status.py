"""What `status` says: rates and times of a made-up folder, what is under way, what was left out and why."""

import json
import os
import platform
import subprocess

import pytest
from photo_shards import picture, tokenize_recipe, write_kept, write_shards, write_tar, write_tokenizer
from typer.testing import CliRunner

from data_pipeline.cli import app
from data_pipeline.ingest.shards import Shard
from data_pipeline.manifest import TextTokenizerManifest, TokenizerManifest
from data_pipeline.status import print_status, read_status
from data_pipeline.tokenize import task as task_module
from data_pipeline.tokenize.folder import DatasetFolder, Plan
from data_pipeline.tokenize.marker import DONE_NAME, marker_text
from data_pipeline.tokenize.run import run_tokenize
from foundation.errors import DataError


def begin(root, tasks):
    """The folder of a job of so many tasks."""
    tokenizer = TokenizerManifest(
        fingerprint="f", downsample=16, bits_per_token=16, dtype="float32", folder="t"
    )
    text = TextTokenizerManifest(name="n", inside=False, vocab_size=9, sha256="s")
    folder = DatasetFolder(root)
    folder.write_plan(Plan(tuple(Shard(f"{n}.tar", 5) for n in range(tasks)), tokenizer, text, None))
    return folder


def finish(folder, number, read, when, **counts):
    """A task's marker, written at `when`."""
    names = ("read", "not_kept", "refused", "too_small", "used", "records")
    marker = {"counts": dict.fromkeys(names, 0) | {"read": read} | counts, "files": {}}
    path = folder.store.path / folder.task(number) / DONE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(marker_text(marker))
    os.utime(path, (when, when))


def test_samples_a_second_and_the_time_that_is_left(tmp_path, capsys):
    folder = begin(tmp_path, 11)
    finish(folder, 0, 100, 1000.0)
    alone = read_status(tmp_path, now=1010.0)
    assert (alone.samples_per_second, alone.seconds_left) == (None, None)
    finish(folder, 1, 300, 1100.0, records=250, refused=20, too_small=13, not_kept=17)
    finish(folder, 2, 200, 1050.0, records=200)
    folder.fail(3, Shard("3.tar", 5), "damaged")
    folder.give_up(4, Shard("4.tar", 5), "damaged too")
    status = read_status(tmp_path, now=1200.0)
    # From the end of task 0 to that of task 1: two tasks, of 200 samples in the mean, in 100 seconds.
    assert status.samples_per_second == pytest.approx(4.0)
    # 11 tasks without 3 done, 1 failed and 1 given up, at 50 seconds each.
    assert status.seconds_left == pytest.approx(6 * 50.0)
    print_status(status)
    said = capsys.readouterr().out
    assert "3 of 11 tasks done, 0 under way, 1 failed, 1 given up; the dataset is not finished" in said
    assert "600 samples read, 17 not kept by the filter, 13 too small for every class, 20 refused" in said
    assert (
        "tasks/*/quarantine.jsonl); 450 records written\n4.0 samples a second, 0.1 h left at that rate"
        in said
    )


@pytest.mark.parametrize("pauses", [{}, {1: 60 * 3600.0}, {3: 7200.0, 9: 90_000.0}])
def test_pauses_do_not_count(tmp_path, pauses):
    folder, when = begin(tmp_path, 30), 1e9
    for number in range(20):
        when += pauses.get(number, 0.0) + 10.0
        finish(folder, number, 100, when)
    status = read_status(tmp_path, now=when)
    # At worst, the task's own ten seconds in each gap that was left out.
    assert status.samples_per_second == pytest.approx(10.0)
    assert status.seconds_left == pytest.approx(100.0)


def test_tasks_that_end_together_are_no_pause(tmp_path):
    """Eight processes, tasks of half an hour: seven gaps of a second, then one of half an hour."""
    folder = begin(tmp_path, 80)
    for number in range(40):
        finish(folder, number, 100, 1e9 + number // 8 * 1800.0 + number % 8)
    status = read_status(tmp_path, now=1e9 + 7300.0)
    assert status.seconds_left == pytest.approx(40 * (4 * 1800.0 + 7) / 39)


def test_what_a_dead_process_of_this_host_has_left_is_not_under_way(tmp_path):
    folder = begin(tmp_path, 3)
    mine, theirs = folder.new_partial(0), folder.new_partial(1)
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = mine.name.replace(f".{os.getpid()}.", f".{ended.pid}.")
    mine.rename(mine.with_name(name))
    assert read_status(tmp_path).running == 1
    # Of another host's process nobody here can say.
    theirs.rename(
        theirs.with_name(name.replace(f".{platform.node()}.", ".elsewhere.").replace("0000.", "0001."))
    )
    assert read_status(tmp_path).running == 1


def test_failures_cleared_and_tasks_given_up_are_counted(tmp_path):
    folder = begin(tmp_path, 3)
    folder.fail(0, Shard("0.tar", 5), "damaged")
    said = CliRunner().invoke(app, ["retry", str(tmp_path)]).output
    assert said.startswith("failures cleared: 1; run")
    said = CliRunner().invoke(app, ["retry", str(tmp_path), "--give-up", "1"]).output
    assert said.startswith("tasks given up: 1; run")


def test_under_way_is_what_changed_in_the_last_ten_minutes(tmp_path):
    folder = begin(tmp_path, 3)
    for number, seconds in ((0, 599.0), (1, 601.0)):
        partial = folder.new_partial(number)
        (partial / "shard").write_bytes(b"")
        for path in (partial / "shard", partial):
            os.utime(path, (5000.0 - seconds, 5000.0 - seconds))
    assert read_status(tmp_path, now=5000.0).running == 1
    os.utime(partial, (5000.0, 5000.0))
    assert read_status(tmp_path, now=5000.0).running == 2


@pytest.fixture
def work(tmp_path):
    write_shards(tmp_path / "shards", 1)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def test_a_task_that_writes_only_at_its_end_is_under_way_all_the_time(work, monkeypatch):
    running, read_shard = list[int](), task_module.read_shard

    def slowly(shard, section):
        """Between two samples, as much time passes as makes everything in the task's folder old."""
        (partial,) = DatasetFolder(work / "latents").partials()
        for sample in read_shard(shard, section):
            for path in (partial, *partial.rglob("*")):
                os.utime(path, (0, 0))
            yield sample
            running.append(read_status(work / "latents").running)

    monkeypatch.setattr(task_module, "HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr(task_module, "read_shard", slowly)
    run_tokenize(tokenize_recipe(work))
    assert running == [1] * 6


def test_pictures_that_fit_no_class_are_counted_and_listed_and_are_not_bad(work, capsys):
    members = []
    for name, height, width in (("good", 64, 64), ("tiny", 20, 20), ("long", 64, 640)):
        members += [(f"{name}.jpg", picture(height + width, height, width)), (f"{name}.txt", b"some words")]
    write_tar(work / "shards" / "00000.tar", members)
    run_tokenize(tokenize_recipe(work, max_bad_fraction=0.0))
    capsys.readouterr()
    print_status(read_status(work / "latents"))
    assert (
        "3 samples read, 0 not kept by the filter, 2 too small for every class, 0 refused"
        in capsys.readouterr().out
    )
    lines = (work / "latents" / "tasks" / "00000" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["tiny", "long"]
    assert "too small for every class" in json.loads(lines[0])["reason"]


def test_the_bad_fraction_is_that_of_the_samples_that_the_filter_kept(work):
    """One of two kept samples is bad: half of them, though a sixth of all."""
    write_shards(work / "shards", 1, bad={1})
    write_kept(work / "kept.parquet", ["first words", "second words"])
    keep = {"rows": str(work / "kept.parquet"), "by": "hash"}
    with pytest.raises(DataError, match=r"1 of 2 samples cannot be used, over max_bad_fraction = 0\.4"):
        run_tokenize(tokenize_recipe(work, keep=keep, max_bad_fraction=0.4))
