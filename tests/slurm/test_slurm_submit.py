"""What `bitdance submit` refuses, what it would submit, and what `jobs` and `logs` tell; nothing trains."""

import os
from pathlib import Path

import pytest
from slurm_runs import ROOT, Lab
from small_cluster import wait_until


def refused(lab: Lab, *options: str, site: Path, name: str = "refused", **changes: object) -> str:
    """The message of a submission that must not happen."""
    done = lab.bitdance("submit", str(lab.recipe(name, **changes)), "--site", str(site), *options)
    assert done.returncode == 78, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (lab.folder / name / "slurm" / "history.jsonl").exists()
    return done.stderr


def test_all_that_is_wrong_is_said_at_once(lab: Lab) -> None:
    site = lab.site(PARTITION="gpus", SHARED_FOLDERS="/shared", GPUS_PER_NODE="8", PYTHON="/opt/no/python")
    message = refused(lab, "--nodes", "many", site=site, data__latents=str(lab.folder / "nowhere"))
    assert "there is no partition 'gpus' (this cluster's: closed, main, urgent)" in message
    assert "'many' is no number of nodes" in message
    assert "nowhere/manifest.json does not exist" in message
    assert "PYTHON: /opt/no/python is no program" in message
    assert "is not in a folder that all nodes see (SHARED_FOLDERS: /shared)" in message


def test_what_the_partition_does_not_give(lab: Lab) -> None:
    site = lab.site(PARTITION="closed", TIME_LIMIT="02:00:00", SAVE_SECONDS="7200", GPUS_PER_NODE="16")
    message = refused(lab, "--nodes", "5", site=site)
    assert "you may not use it: only the groups nobody-is-in-it may" in message
    assert "5 nodes asked for, partition closed has 4" in message
    assert "02:00:00 is above 01:00:00" in message
    assert "7200 s before the limit of 02:00:00 is before the start" in message
    assert "16 are wanted, the nodes of partition closed have 8" in message
    assert "8 samples cannot be shared out among 80 GPUs" in message


def test_a_model_that_needs_more_gpus(lab: Lab) -> None:
    backbone = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    random = {"text_tokenizer": str(lab.folder / "text"), "backbone": backbone | heads}
    site = lab.site(GPUS_PER_NODE="1", GPU_KIND="a100-40g")
    message = refused(lab, site=site, model__random=random, model__head={"width": 1024})
    assert "it needs more than the 1 GPUs (a100-40g) asked for" in message


def test_gpus_are_not_forgotten(lab: Lab) -> None:
    """Without a word about them a large model would train on the nodes' CPUs."""
    site = lab.folder / "site-silent.env"
    site.write_text("PARTITION=main\n")
    message = refused(lab, site=site)
    assert "partition main have 8 GPUs, and how many a job is to use is not said" in message


def test_without_slurm(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lab.cluster.environment, "PATH", "/nonexistent")
    message = refused(lab, site=lab.site())
    assert "sbatch, scontrol, squeue, scancel not found (submit on a login node" in message


def test_a_misspelt_site_file(lab: Lab) -> None:
    site = lab.folder / "site-wrong.env"
    site.write_text("PARTITON=main\nGPUS_PER_NODE=eight\nexport MY_OWN=1\nmodule load cuda\n")
    message = refused(lab, site=site)
    assert f"{site}:1: unknown name PARTITON (did you mean PARTITION?)" in message
    assert f"{site}:2: GPUS_PER_NODE=eight" in message


def test_a_dry_run_prints_the_script_and_leaves_nothing(lab: Lab) -> None:
    recipe = lab.recipe("dry", world__processes=3)
    done = lab.bitdance("submit", str(recipe), "--nodes", "2-4", "--site", str(lab.site()), "--dry-run")
    assert done.returncode == 0, done.stderr
    for line in ("--nodes=2-4", "--ntasks-per-node=3", "--partition=main", "--signal=B:USR1@600"):
        assert f"#SBATCH {line}" in done.stdout
    assert "srun --kill-on-bad-exit=1" in done.stdout
    assert not (lab.folder / "dry").exists()


def test_stages_that_do_not_follow_upon_each_other(lab: Lab) -> None:
    first = lab.recipe("first")
    model = {"p": 4, "init_from": str(lab.folder / "other" / "export"), "random": None, "head": None}
    second = lab.recipe("second", model=model)
    done = lab.bitdance("submit", "--chain", str(first), str(second), "--site", str(lab.site()))
    assert done.returncode == 78
    assert f"is not the export of the stage before (give {lab.folder / 'first'}/export)" in done.stderr


def test_a_second_job_on_the_same_run_is_refused_and_a_waiting_one_is_told(lab: Lab) -> None:
    site = lab.site(SBATCH_OPTIONS="--begin=now+1hour")
    run = lab.submit("waits", site=site)
    again = lab.bitdance("submit", str(lab.folder / "waits.yaml"), "--site", str(site))
    assert again.returncode == 78 and f"job {run.number} is pending on it" in again.stderr
    told = lab.bitdance("jobs", str(lab.folder)).stdout
    (row,) = [line for line in told.splitlines() if str(run.path) in line]
    assert "pending" in row and "0/40" in row and "BeginTime" in row
    assert lab.bitdance("logs", str(run.path)).returncode == 65  # not started
    done = lab.bitdance("cancel", str(run.path))
    assert done.returncode == 0 and "is cancelled" in done.stdout
    wait_until(lambda: run.state() == "CANCELLED", 60, "the cancellation")


@pytest.mark.parametrize("name", ["train", "tokenize", "export", "command"])
def test_the_scripts_are_bash(name: str) -> None:
    assert os.system(f"bash -n {ROOT}/slurm/{name}.sbatch") == 0
