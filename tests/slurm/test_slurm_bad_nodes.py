"""Nodes that cannot train, in a real Slurm: each is left out by name, and the job goes on with the others."""

from pathlib import Path

import pytest
import torch
from slurm_runs import Lab, Run
from small_cluster import Cluster

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
    run = lab.submit("no-gpus", site=lab.site(GPUS_PER_NODE="1"))
    run.wait(run.over, "the end")
    assert run.state() == "FAILED" and run.cluster.job(run.number)["ExitCode"] == "78:0"
    for name in run.nodes():
        assert f"bitdance: on {name}: torch sees 0 of the 1 GPUs that the job has on it" in run.log()


@pytest.mark.parametrize("name", ["n1", "n2"])
def test_a_node_without_the_interpreter_is_left_out_by_name(lab: Lab, faulty: Cluster, name: str) -> None:
    """The batch host, which decides what comes next by that interpreter, or another node."""
    python = lab.interpreter()
    faulty.hide(name, python.parent)
    run = lab.submit(f"no-python-{name}", site=lab.site(PYTHON=str(python)))
    run.wait(lambda: run.events("started"), "training on other nodes")
    assert f"bitdance: bad node {name}: there is no {python}" in run.log()
    assert run.cluster.job(run.number)["ExcNodeList"] == name
    assert name not in run.nodes()
