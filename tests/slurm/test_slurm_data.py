"""Data jobs on a real Slurm, and the whole chain from photos to a picture by one command."""

import random
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from photo_shards import write_shards, write_tokenizer
from slurm_runs import Lab, bare_on
from small_cluster import Cluster, kill, wait_until
from small_stage import recipe_values

from data_pipeline.latents import LatentDataset

pytestmark = pytest.mark.slurm_long
SAMPLES = 3  # in a shard
TASK_KILLS = 5
PATIENCE = 1500.0


def filter_yaml(folder: Path, dropped: int) -> Path:
    """A recipe of `data filter` that keeps the rows of all pictures but one."""
    rows = [
        {"url": f"u{n}", "text": f"number {n}", "hash": n, "AESTHETIC_SCORE": 1.0 if n == dropped else 6.0}
        for n in range(4 * SAMPLES)
    ]
    metadata = folder / "metadata.parquet"
    pq.write_table(pa.Table.from_pylist(rows), metadata)
    rule = {"rule": "score", "column": "aesthetic", "above": 5.0}
    path = folder / "filter.yaml"
    values = {"sources": [str(metadata)], "output": str(folder / "filtered"), "rules": [rule]}
    path.write_text(yaml.safe_dump(values))
    return path


def tokenize_yaml(folder: Path, **more: Any) -> Path:
    """A recipe of `data tokenize` for what `write_shards` has written; every picture that is kept is used."""
    values = {
        "input": {"kind": "webdataset", "path": [str(folder / "shards")]},
        "tokenizer": str(folder / "tokenizer"),
        "text_tokenizer": {"train": {"vocab_size": 300}},
        "output": str(folder / "latents"),
        "classes": [{"resolution": 128, "buckets": [[128, 128]]}],
        "pictures": {"max_upscale": 8.0},
        "near_duplicates": None,
        "compute": {"processes": 0},  # forty elements would each wait for a worker process to start
        **more,
    }
    path = folder / "tokenize.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def photos(lab: Lab, name: str, shards: int) -> Path:
    folder = lab.folder / name
    write_shards(folder / "shards", shards, SAMPLES)
    write_tokenizer(folder / "tokenizer")
    return folder


def keys_written(shards: int) -> list[str]:
    """Of all pictures."""
    return [f"{shard:05d}{i:04d}" for shard in range(shards) for i in range(SAMPLES)]


def keys_of(folder: Path) -> list[str]:
    """Of the samples of a dataset, each as often as it is there."""
    dataset = LatentDataset(str(folder / "latents"))
    return sorted(dataset.record(128, number).key for number in range(dataset.classes[128].samples))


def test_an_array_of_forty_with_a_dead_node_and_five_killed_tasks(lab: Lab, faulty: Cluster) -> None:
    folder = photos(lab, "array", 40)
    done = lab.bitdance(
        *("submit", str(tokenize_yaml(folder)), "--slices", "40"),
        *("--site", str(lab.site(ARRAY_AT_ONCE="4", DATA_OPTIONS="--mem=40G"))),
    )
    assert done.returncode == 0, done.stderr
    array, finalize = (int(line.split(":")[0].split()[1]) for line in done.stdout.splitlines())
    moments, killed, started, crashed = random.Random(0), 0, time.monotonic(), False
    while faulty.job(finalize)["JobState"] != "COMPLETED":
        assert time.monotonic() - started < PATIENCE, lab.bitdance("jobs", str(lab.folder)).stdout
        assert faulty.job(finalize)["JobState"] in ("PENDING", "RUNNING"), done.stdout
        tasks = len(list((folder / "latents" / "tasks").glob("[0-9]*")))
        if not crashed and tasks >= 10:
            faulty.crash_node("n4")
            crashed = True
        alive = [pid for name in faulty.nodes for pid in faulty.processes(name, "bitdance data tokenize")]
        if alive and killed < TASK_KILLS and tasks > 6 * killed:
            kill(moments.choice(alive))
            killed += 1
        time.sleep(1)
    assert killed == TASK_KILLS and crashed
    assert keys_of(folder) == keys_written(40)
    restarts = faulty.run("scontrol", "show", "job", "-o", str(array)).count("Restarts=1 ")
    print(f"\nan array of 40 with {restarts} restarted elements: {time.monotonic() - started:.0f} s")
    assert restarts >= 2  # a kill may hit an element twice, or one that has just committed its last task


HELP = '*"bitdance data --help"*'  # what a job of `Lab.command` does
TOLD = 7  # more than the failures that a command may have


def test_a_command_may_be_told_to_stop_as_often_as_need_be(lab: Lab) -> None:
    """Once when it runs, and notices; else while it is launched: srun drops what comes then."""
    works = "trap 'echo told; exit 75' USR1; echo works; for _ in $(seq 600); do sleep 0.1; done; echo missed"
    first = f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {TOLD} ] && case "$*" in {HELP}) {works};; esac'
    log = lab.folder / "told.log"
    number = lab.command(log, PYTHON=str(lab.interpreter(first)))
    for start in range(TOLD):
        moment = "works" if start == 0 else f"bitdance: start {start} of job"
        wait_until(lambda moment=moment: log.exists() and moment in log.read_text(), 120, moment)
        lab.cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    wait_until(lambda: lab.cluster.job(number)["JobState"] == "COMPLETED", 120, "the end")
    said = log.read_text()
    assert "told\n" in said[: said.index("bitdance: again: ")]
    assert "missed" not in said and said.count("bitdance: again: told to stop") == TOLD


def test_a_job_that_is_not_ready_in_time_is_put_back_too(lab: Lab) -> None:
    """It is told to stop before its limit, and still saves when Slurm ends it."""
    works = "trap '' USR1; trap 'exit 75' TERM; for _ in $(seq 3000); do sleep 0.1; done"
    first = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && case "$*" in {HELP}) {works};; esac'
    log = lab.folder / "late.log"
    number = lab.command(log, "--time=1", PYTHON=str(lab.interpreter(first)))
    wait_until(lambda: lab.cluster.job(number)["JobState"] == "COMPLETED", 300, "the end")
    assert "bitdance: again: told to stop" in log.read_text()
    assert lab.cluster.job(number)["Restarts"] == "1"


def test_elements_leave_out_a_node_with_another_interpreter(lab: Lab) -> None:
    """One element, and what finishes the dataset after it, meet it: each goes elsewhere by itself."""
    folder, python = photos(lab, "no-python", 3), lab.interpreter(first=bare_on("n1"))
    site = lab.site(PYTHON=str(python), DATA_OPTIONS="--mem=40G")  # one element to a node
    done = lab.bitdance("submit", str(tokenize_yaml(folder)), "--slices", "3", "--site", str(site))
    assert done.returncode == 0, done.stderr
    array, finalize = (int(line.split(":")[0].split()[1]) for line in done.stdout.splitlines())
    over = ("COMPLETED", "FAILED", "CANCELLED")
    wait_until(lambda: lab.cluster.job(finalize)["JobState"] in over, PATIENCE, "the dataset")
    assert keys_of(folder) == keys_written(3)
    elements = lab.cluster.elements(array)
    moved = [(job["Restarts"], job["ExcNodeList"]) for job in elements]
    assert sorted(moved) == [("0", "(null)"), ("0", "(null)"), ("1", "n1")]
    assert lab.cluster.job(finalize)["ExcNodeList"] == "n1"


def test_the_whole_chain_by_one_command(lab: Lab) -> None:
    folder = photos(lab, "chain", 4)
    keep = {"rows": str(folder / "filtered" / "kept.parquet"), "by": "hash"}
    recipes, before = [filter_yaml(folder, dropped=5), tokenize_yaml(folder, keep=keep)], None
    for stage, p in (("pt", 4), ("ct", 4), ("sft", 4), ("distill", 8)):
        values = recipe_values(folder, run=str(folder / stage), steps=6, model__p=p)
        values["data"] |= {"global_batch_size": 4, "ratio": {128: 1}, "latents": str(folder / "latents")}
        values["model"]["random"]["text_tokenizer"] = str(folder / "latents" / "text_tokenizer")
        if before is not None:
            grown = {"grow_from": 4} if p == 8 else {}
            values["model"] = {"p": p, "init_from": str(folder / before / "export"), **grown}
        before = stage
        recipes.append(folder / f"{stage}.yaml")
        recipes[-1].write_text(yaml.safe_dump(values))
    published = folder / "published"
    started = time.monotonic()
    done = lab.bitdance(
        *("submit", "--chain", *map(str, recipes), "--slices", "2", "--nodes", "2"),
        *("--publish", str(published), "--prompt", "a picture of number 3", "--size", "128x128"),
        *("--site", str(lab.site())),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = [int(line.split(":")[0].split()[1]) for line in done.stdout.splitlines()]
    assert len(numbers) == 8  # the filter, the array, finalize, four stages, export
    while (states := [lab.cluster.job(number)["JobState"] for number in numbers])[-1] != "COMPLETED":
        assert not {"FAILED", "CANCELLED"} & set(states), lab.bitdance("jobs", str(folder)).stdout
        assert time.monotonic() - started < PATIENCE, states
        time.sleep(1)
    assert keys_of(folder) == sorted(
        set(keys_written(4)) - {"000010002"}
    )  # number 5 is the second shard's third
    (picture,) = Path(f"{published}-pictures").glob("*.png")
    assert picture.stat().st_size > 0
    print(f"\nthe chain, from metadata and photos to a picture: {time.monotonic() - started:.0f} s")
    again = lab.bitdance("submit", "--chain", *map(str, recipes), "--nodes", "2", "--site", str(lab.site()))
    assert again.stdout.count("done already") == 7 and "job " not in again.stdout
