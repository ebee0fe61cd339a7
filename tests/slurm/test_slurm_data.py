"""Data jobs on a real Slurm, and the whole chain from photos to a picture by one command."""

import random
import time
from pathlib import Path

import pytest
import yaml
from photo_shards import write_shards, write_tokenizer
from slurm_runs import Lab
from small_cluster import Cluster, kill
from small_stage import recipe_values

from data_pipeline.latents import LatentDataset

pytestmark = pytest.mark.slurm_long
SAMPLES = 3  # in a shard
TASK_KILLS = 5
PATIENCE = 1500.0


def tokenize_yaml(folder: Path) -> Path:
    """A recipe of `data tokenize` for what `write_shards` has written; every picture is used."""
    values = {
        "input": {"kind": "webdataset", "path": [str(folder / "shards")]},
        "tokenizer": str(folder / "tokenizer"),
        "text_tokenizer": {"train": {"vocab_size": 300}},
        "output": str(folder / "latents"),
        "classes": [{"resolution": 128, "buckets": [[128, 128]]}],
        "pictures": {"max_upscale": 8.0},
        "near_duplicates": None,
    }
    path = folder / "tokenize.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def photos(lab: Lab, name: str, shards: int) -> Path:
    folder = lab.folder / name
    write_shards(folder / "shards", shards, SAMPLES)
    write_tokenizer(folder / "tokenizer")
    return folder


def jobs_of(cluster: Cluster, number: int) -> list[str]:
    """State of each element of an array."""
    text = cluster.run("scontrol", "show", "job", "-o", str(number))
    return [line.partition("JobState=")[2].split()[0] for line in text.splitlines()]


def test_an_array_of_forty_with_a_dead_node_and_five_killed_tasks(lab: Lab, faulty: Cluster) -> None:
    folder = photos(lab, "array", 40)
    done = lab.bitdance(
        *("submit", str(tokenize_yaml(folder)), "--slices", "40"),
        *("--site", str(lab.site(ARRAY_AT_ONCE="4", MEMORY_PER_NODE="40G"))),
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
    dataset = LatentDataset(str(folder / "latents"))
    count = dataset.classes[128].samples
    keys = [dataset.record(128, number).key for number in range(count)]
    assert sorted(keys) == [f"{shard:05d}{i:04d}" for shard in range(40) for i in range(SAMPLES)]
    restarts = faulty.run("scontrol", "show", "job", "-o", str(array)).count("Restarts=1 ")
    print(f"\nan array of 40 with {restarts} restarted elements: {time.monotonic() - started:.0f} s")
    assert restarts >= 2  # a kill may hit an element twice, or one that has just committed its last task


def test_the_whole_chain_by_one_command(lab: Lab) -> None:
    folder = photos(lab, "chain", 4)
    recipes, before = [tokenize_yaml(folder)], None
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
    assert len(numbers) == 7  # the array, finalize, four stages, export
    while (states := [lab.cluster.job(number)["JobState"] for number in numbers])[-1] != "COMPLETED":
        assert not {"FAILED", "CANCELLED"} & set(states), lab.bitdance("jobs", str(folder)).stdout
        assert time.monotonic() - started < PATIENCE, states
        time.sleep(1)
    (picture,) = Path(f"{published}-pictures").glob("*.png")
    assert picture.stat().st_size > 0
    print(f"\nthe chain, from photos to a picture: {time.monotonic() - started:.0f} s")
    again = lab.bitdance("submit", "--chain", *map(str, recipes), "--nodes", "2", "--site", str(lab.site()))
    assert again.stdout.count("done already") == 6 and "job " not in again.stdout
