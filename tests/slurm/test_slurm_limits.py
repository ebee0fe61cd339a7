"""How many nodes and how much time a job may ask for before it is submitted; the cluster is a stand-in."""

from pathlib import Path

import pytest
import yaml
from stand_in import filter_values, partition_line, stage, submit, tokenize_values, write_commands

from slurm import checks
from slurm.checks import DATA_SAVE_SECONDS
from slurm.fitting import _Packs
from slurm.script import SCRIPTS


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("99999999999", "99999999999 nodes asked for, partition main has 16"),
        ("99999999999", "(these numbers of nodes do: 1-2, 4, 8; or change data."),
        ("1-3000000", "nor on 5-7, 9-16 (these numbers of nodes do: 1-2, 4, 8; or change data."),
    ],
)
def test_no_more_nodes_are_looked_at_than_the_partition_has(
    inputs: Path, tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, words: str
) -> None:
    refused = _Packs.refused

    def few(self: _Packs, numbers: range, tasks: int) -> dict[int, str]:
        assert len(numbers) <= 16
        return refused(self, numbers, tasks)

    monkeypatch.setattr(_Packs, "refused", few)
    recipe = stage(inputs, tmp_path, data__max_tokens=500, data__ratio={256: 1})
    assert words in submit(tmp_path, str(recipe), "--nodes", nodes) and told.read_text() == ""


@pytest.mark.parametrize(
    ("partition", "site", "words"),
    [
        (
            {"DefaultTime": "00:10:00"},
            {},
            "limit of 00:10:00 is before the start (lower it, or have more than",
        ),
        ({"DefaultTime": "00:10:00"}, {}, "have more than DefaultTime of partition main gives"),
        ({"DefaultTime": "00:10:00"}, {"SAVE_SECONDS": "599"}, ""),
        ({"DefaultTime": "00:10:00"}, {"TIME_LIMIT": "11"}, ""),
        ({"DefaultTime": "00:10:00"}, {"SBATCH_OPTIONS": "--time=11"}, ""),
        ({"MaxTime": "00:10:00"}, {}, "have more than MaxTime of partition main gives"),
        ({"MaxTime": "00:10:00", "DefaultTime": "00:05:00"}, {}, "before the limit of 00:05:00 is before"),
        ({}, {"TIME_LIMIT": "10"}, "SAVE_SECONDS: 600 s before the limit of 10 is before the start"),
        ({}, {"TIME_LIMIT": "60", "SBATCH_OPTIONS": "--time=9"}, "than --time in SBATCH_OPTIONS gives"),
        ({}, {"TIME_LIMIT": "9", "SBATCH_OPTIONS": "--time=60"}, ""),
        ({}, {"SBATCH_OPTIONS": "--time=soon"}, "--time in SBATCH_OPTIONS: soon is no time"),
        ({"MaxTime": "01:00:00"}, {"SBATCH_OPTIONS": "--time=61"}, "61 is above 01:00:00, the most of"),
        ({"MaxTime": "01:00:00"}, {"TIME_LIMIT": "UNLIMITED"}, "UNLIMITED is above 01:00:00, the most of"),
        ({"MaxTime": "01:00:00"}, {"SBATCH_OPTIONS": "--time=-1"}, "-1 is above 01:00:00, the most of"),
        ({}, {"TIME_LIMIT": "0"}, ""),
    ],
)
def test_the_limit_in_force_leaves_time_before_the_save(
    inputs: Path, tmp_path: Path, told: Path, partition: dict[str, str], site: dict[str, str], words: str
) -> None:
    write_commands(tmp_path / "bin", **partition)
    message = submit(tmp_path, str(stage(inputs, tmp_path)), **site)
    assert words in message and message.count("before the start") <= 1
    assert bool(told.read_text()) is (words == "")


@pytest.mark.parametrize("published", ["new", "there"])
def test_memory_is_looked_at_where_nothing_else_is_wrong(
    inputs: Path, tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch, published: str
) -> None:
    """It takes seconds for each stage: nobody is to wait for it who is refused anyway, nor without a word."""
    asked: list[str] = []
    monkeypatch.setattr(checks, "check_memory", lambda problems, work, *about: asked.append(work.title))
    (tmp_path / "there").mkdir()
    recipe, folder = str(stage(inputs, tmp_path)), str(tmp_path / published)
    message = submit(tmp_path, recipe, "--nodes", "2", "--publish", folder, GPUS_PER_NODE="2")
    fits = f"train {tmp_path}/run: looking whether it fits into 4 GPUs (b200-180g)"
    if published == "new":
        assert len(asked) == 1 and message.startswith(f"{fits}\n")
    else:
        assert not asked and fits not in message and "is there already" in message


@pytest.mark.parametrize("where", ["DATA_OPTIONS", "DATA_PARTITION", "PARTITION"])
def test_the_limit_of_data_jobs_leaves_time_too(tmp_path: Path, told: Path, where: str) -> None:
    """Told to stop at once, each start would do nothing, and be followed by the next."""
    recipe = tmp_path / "filter.yaml"
    recipe.write_text(yaml.safe_dump(filter_values(tmp_path)))
    site = {"DATA_OPTIONS": "--time=2"} if where == "DATA_OPTIONS" else {where: "main"}
    write_commands(tmp_path / "bin", DefaultTime="NONE" if where == "DATA_OPTIONS" else "00:02:00")
    message = submit(tmp_path, str(recipe), **site)
    source = "--time in DATA_OPTIONS" if where == "DATA_OPTIONS" else "DefaultTime of partition main"
    limit = "2" if where == "DATA_OPTIONS" else "00:02:00"
    words = f"data jobs are told to stop: 120 s before the limit of {limit} is before the start"
    assert f"{words} (have more than {source} gives)" in message and "SAVE_SECONDS" not in message


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_partition_in_which_an_array_computes_leaves_it_time(
    tmp_path: Path, told: Path, device: str
) -> None:
    """That of the GPUs, and not the one of data jobs."""
    recipe = tmp_path / "tokenize.yaml"
    recipe.write_text(yaml.safe_dump(tokenize_values(tmp_path) | {"compute": {"device": device}}))
    cpus = partition_line(PartitionName="cpus", Default="NO")
    write_commands(tmp_path / "bin", second=f"\n{cpus}", DefaultTime="00:02:00")
    message = submit(tmp_path, str(recipe), PARTITION="main", DATA_PARTITION="cpus")
    assert message.count("data jobs are told to stop: 120 s before the limit") == (device == "cuda")
    assert ("(have more than DefaultTime of partition main gives)" in message) is (device == "cuda")


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (
            {"DATA_OPTIONS": "--partition=short"},
            "data jobs are told to stop: 120 s before the limit of 00:02:00",
        ),
        ({"DATA_OPTIONS": "--partition=nowhere"}, "there is no partition 'nowhere'"),
        ({"SBATCH_OPTIONS": "--partition=short"}, ""),
        ({"PARTITION": "down", "DATA_PARTITION": "main"}, ""),
    ],
)
def test_a_data_job_is_held_against_the_partition_that_sbatch_takes(
    tmp_path: Path, told: Path, site: dict[str, str], words: str
) -> None:
    """And against no other one: it does not train."""
    short = partition_line(PartitionName="short", Default="NO", DefaultTime="00:02:00")
    down = partition_line(PartitionName="down", Default="NO", State="DOWN")
    write_commands(tmp_path / "bin", second=f"\n{short}\n{down}")
    recipe = tmp_path / "filter.yaml"
    recipe.write_text(yaml.safe_dump(filter_values(tmp_path)))
    message = submit(tmp_path, str(recipe), **site)
    assert words in message
    assert ("partition" in message) is (words != "")


def test_what_is_done_asks_nothing_of_a_partition(tmp_path: Path, told: Path) -> None:
    recipe = tmp_path / "filter.yaml"
    recipe.write_text(yaml.safe_dump(filter_values(tmp_path)))
    write_commands(tmp_path / "bin", State="DOWN")
    assert "partition main: it is down" in submit(tmp_path, str(recipe))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "kept.parquet").touch()
    assert "done already" in submit(tmp_path, str(recipe))


@pytest.mark.parametrize("name", ["tokenize", "command"])
def test_data_jobs_are_told_to_stop_when_submission_thinks_so(name: str) -> None:
    assert f"#SBATCH --signal=B:USR1@{DATA_SAVE_SECONDS}\n" in (SCRIPTS / f"{name}.sbatch").read_text()
