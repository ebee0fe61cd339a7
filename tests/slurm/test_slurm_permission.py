"""Who may use a partition, as `bitdance submit` tells it without a cluster: its commands are stand-ins."""

from pathlib import Path

import pytest
import yaml
from stand_in import filter_values, stage, submit, write_commands


@pytest.mark.parametrize(
    ("partition", "site", "words"),
    [
        (
            {"AllowAccounts": "a,b"},
            {"ACCOUNT": "c"},
            "it takes the accounts a,b only, this one is 'c' (set ACCOUNT",
        ),
        ({"AllowAccounts": "a,b"}, {"ACCOUNT": "B"}, ""),  # Slurm does not tell them apart
        ({"AllowAccounts": "a,b"}, {}, "it takes the accounts a,b only, and none is given (set ACCOUNT"),
        ({"AllowAccounts": "a,b"}, {"SBATCH_OPTIONS": "--account=a"}, ""),
        ({"AllowAccounts": "a,b"}, {"ACCOUNT": "a", "SBATCH_OPTIONS": "--account=c"}, "this one is 'c'"),
        (
            {"AllowAccounts": None, "DenyAccounts": "a,b"},
            {"ACCOUNT": "b"},
            "it takes no account of a,b, and this one",
        ),
        ({"AllowAccounts": None, "DenyAccounts": "a,b"}, {"ACCOUNT": "c"}, ""),
        ({"AllowAccounts": None, "DenyAccounts": "a,b"}, {}, ""),
        ({"AllowQos": "high"}, {"QOS": "low"}, "it takes the QOS high only, this one is 'low' (set QOS"),
        ({"AllowQos": "high"}, {}, ""),  # the user's own is not known
        ({"DenyQos": "low"}, {"QOS": "low"}, "it takes no QOS of low, and this one is 'low'"),
        ({"AllowGroups": "nobody-is-in-it"}, {}, "you may not use it: only the groups nobody-is-in-it may"),
        ({"State": "DRAIN"}, {}, "partition main: it is drain (take another"),
    ],
)
def test_who_may_use_a_partition(
    inputs: Path,
    tmp_path: Path,
    told: Path,
    partition: dict[str, str | None],
    site: dict[str, str],
    words: str,
) -> None:
    write_commands(tmp_path / "bin", **partition)
    message = submit(tmp_path, str(stage(inputs, tmp_path)), **site)
    assert words in message and bool(told.read_text()) is (words == "")


@pytest.mark.parametrize(("default", "submitted"), [("a", True), ("c", False), ("", False)])
def test_ones_default_account_is_asked_for(
    inputs: Path, tmp_path: Path, told: Path, default: str, submitted: bool
) -> None:
    write_commands(tmp_path / "bin", AllowAccounts="a,b")
    (tmp_path / "bin" / "sacctmgr").write_text(f"#!/bin/sh\necho {default}\n")
    (tmp_path / "bin" / "sacctmgr").chmod(0o755)
    message = submit(tmp_path, str(stage(inputs, tmp_path)))
    assert message.startswith("job 101") is submitted


def test_the_shell_s_account_goes_before_the_site_file_s(
    inputs: Path, tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sbatch has it."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "c")
    write_commands(tmp_path / "bin", AllowAccounts="a,b")
    assert "this one is 'c'" in submit(tmp_path, str(stage(inputs, tmp_path)), ACCOUNT="a")


def test_the_shell_s_partition_goes_before_the_site_file_s(
    inputs: Path, tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(stage(inputs, tmp_path))
    monkeypatch.setenv("SBATCH_PARTITION", "of-the-shell")
    assert "there is no partition 'of-the-shell'" in submit(tmp_path, recipe, PARTITION="main")
    monkeypatch.delenv("SBATCH_PARTITION")
    option = {"SBATCH_OPTIONS": "--partition=of-the-options"}
    assert "there is no partition 'of-the-options'" in submit(tmp_path, recipe, PARTITION="main", **option)


@pytest.mark.parametrize("kind", ["data", "stage"])
def test_the_partition_of_data_jobs_is_looked_at_where_there_are_any(
    inputs: Path, tmp_path: Path, told: Path, kind: str
) -> None:
    recipe = stage(inputs, tmp_path)
    if kind == "data":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(filter_values(tmp_path)))
    message = submit(tmp_path, str(recipe), PARTITION="main", DATA_PARTITION="cpus")
    there = "site.env: DATA_PARTITION: there is no partition 'cpus' (this cluster's: main)" in message
    assert there is (kind == "data")
