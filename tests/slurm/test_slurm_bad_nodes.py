"""Nodes that cannot train, in a real Slurm: each is left out by name, and the job goes on with the others."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from slurm_runs import Lab, Run, bare_on
from small_cluster import Cluster, wait_until

pytestmark = pytest.mark.slurm_long


def site_with(lab: Lab, line: str) -> Path:
    """A site file with a line of its own."""
    site = lab.site()
    site.write_text(f"{site.read_text()}{line}\n")
    return site


@pytest.mark.parametrize(
    ("name", "hidden", "words"),
    [("n1", "latents", "has no manifest.json"), ("n2", ".", "it sees no ")],
)
def test_a_bad_node_is_left_out_by_name(
    lab: Lab, faulty: Cluster, name: str, hidden: str, words: str
) -> None:
    """A node does not see the latents, or nothing of the shared folder: the job goes on without it."""
    faulty.hide(name, lab.folder / hidden)
    run = lab.submit(f"bad-{name}")
    run.wait(lambda: run.events("started"), "training on other nodes")
    (end,) = run.history("end")
    assert end["without"] == [name] and words in end["why"]
    assert f"bitdance: bad node {name}: " in run.log()
    assert run.cluster.job(run.number)["ExcNodeList"] == name
    assert name not in run.nodes()
    assert "DOWN" not in str(faulty.states()) and "DRAIN" not in str(faulty.states())


def test_a_node_without_room_on_its_disk_is_left_out_and_the_others_train(
    lab: Lab, undisturbed: Run, faulty: Cluster
) -> None:
    disk = lab.folder / "disk"
    disk.mkdir()
    faulty.hide("n2", disk, size="64m")
    run = lab.submit("no-room", site=site_with(lab, f"export TMPDIR={disk}"))
    run.wait_for_end()
    bad, last = run.history("end")
    assert bad["why"] == f"n2: 0.1 GB are free in {disk}, 2 are needed"
    assert bad["without"] == ["n2"] and "n2" not in run.nodes()
    assert last["why"] == "finished" and run.curve() == undisturbed.curve()


def test_a_node_that_stays_silent_is_left_out(lab: Lab, undisturbed: Run) -> None:
    python = lab.interpreter(first='[ "$SLURMD_NODENAME" = n2 ] && exec sleep 600')
    run = lab.submit("silent", site=lab.site(PYTHON=str(python), PREFLIGHT_OPTIONS="--patience 40"))
    run.wait_for_end()
    bad, _ = run.history("end")
    assert bad["why"] == "n2: rank 1 has not answered within 40 s"
    assert bad["without"] == ["n2"] and "n2" not in run.nodes()
    assert run.curve() == undisturbed.curve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the nodes' GPUs are false, this machine's is not")
def test_gpus_that_no_node_sees_end_the_job(lab: Lab) -> None:
    reason = "torch sees 0 of the 1 GPUs that the job has on it"
    run = lab.submit("no-gpus", site=lab.site(GPUS_PER_NODE="1"))
    run.wait(run.over, "the end")
    assert run.state() == "FAILED" and run.cluster.job(run.number)["ExitCode"] == "78:0"
    for name in run.nodes():
        assert f"bitdance: bad node {name}: {reason}" in run.log()
    (end,) = run.history("end")
    assert end["why"] == f"all 2 nodes say: {reason}"


@pytest.mark.parametrize("name", ["n1", "n2"])
def test_a_node_without_the_interpreter_is_left_out_by_name(lab: Lab, faulty: Cluster, name: str) -> None:
    """The batch host, which decides what comes next by that interpreter, or another node."""
    python = lab.interpreter()
    faulty.hide(name, python.parent)
    run = lab.submit(f"no-python-{name}", site=lab.site(PYTHON=str(python)))
    run.wait(lambda: run.events("started"), "training on other nodes")
    assert f"bitdance: bad node {name}: no working {python}" in run.log()
    assert run.cluster.job(run.number)["ExcNodeList"] == name
    assert name not in run.nodes()


@pytest.mark.parametrize(
    ("name", "words"), [("n1", "no working {python}: "), ("n2", "{python} cannot run this code (No module")]
)
def test_a_node_with_another_interpreter_is_left_out_by_name(lab: Lab, name: str, words: str) -> None:
    """It starts, but has none of the packages."""
    python = lab.interpreter(first=bare_on(name))
    run = lab.submit(f"bare-python-{name}", site=lab.site(PYTHON=str(python)))
    run.wait(lambda: run.events("started"), "training on other nodes")
    said = words.format(python=python if name == "n1" else sys.executable)
    assert f"bitdance: bad node {name}: {said}" in run.log()
    assert run.cluster.job(run.number)["ExcNodeList"] == name
    assert name not in run.nodes()


def test_the_first_rank_that_fails_ends_the_others(lab: Lab) -> None:
    """Also those that would never notice."""
    first = 'case "$*" in *slurm.rank*) [ "$SLURM_PROCID" = 1 ] && exit 9; exec sleep 600;; esac'
    run = lab.submit("one-fails", site=lab.site(PYTHON=str(lab.interpreter(first))))
    run.wait(lambda: run.history("end"), "the end of the start", seconds=120)
    assert run.history("end")[0]["code"] == 128 + signal.SIGTERM  # srun's: the highest one


def test_what_sbatch_hands_on_from_another_job_does_not_count(lab: Lab) -> None:
    """A job by plain sbatch, given in a shell that is itself in a job of another kind."""
    log = lab.folder / "by-hand.log"
    foreign = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4710", "SLURM_ARRAY_TASK_ID": "2"}
    foreign |= {
        "SLURM_RESTART_COUNT": "3",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x8",
    }
    foreign |= {
        "SLURM_GPUS_PER_TASK": "1",
        "SLURM_GPUS": "2",
        "SLURM_MEM_PER_CPU": "100",
        "SLURM_NTASKS": "4",
    }
    number = lab.command(log, **foreign)
    over = ("COMPLETED", "FAILED", "CANCELLED")
    wait_until(lambda: lab.cluster.job(number)["JobState"] in over, 120, "the end")
    said = log.read_text()
    assert lab.cluster.job(number)["JobState"] == "COMPLETED", said
    assert f"bitdance: start 0 of job {number} " in said and said.count("Usage: ") == 1, said
