"""What befalls a cluster, done to training runs: each goes on from its last commit, ends in the same curve.

Every test prints how long the run stood still, and how much of that Slurm took to start the job again.
"""

import os
import random
import re
import signal
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from slurm_runs import EVERY, PATIENCE, STEPS, Lab, Run, lines
from small_cluster import Cluster, kill, wait_until

START = re.compile(r"^bitdance: start \d+ of job .*, (\S+)$", re.MULTILINE)

pytestmark = pytest.mark.slurm_long


def report(what: str, run: Run, struck: float) -> None:
    """Print how long a fault has cost; starts are those of the run's own record."""
    trains = next(event["time"] for event in run.events("started") if event["time"] > struck)
    begins = [datetime.fromisoformat(moment).timestamp() for moment in START.findall(run.log())]
    slurm = next(begin for begin in begins if begin > struck) - struck
    print(
        f"\n{what}: trains again after {trains - struck:.0f} s, {slurm:.0f} s of them until Slurm started it"
    )


def assert_no_stale_write(run: Run) -> None:
    """No start has saved anything after its successor had begun."""
    begun = {int(path.stem): lines(path)[0]["time"] for path in (run.path / "starts").glob("*.json")}
    for saved in run.events("saved"):
        successor = begun.get(saved["start"] + 1, float("inf"))
        assert saved["time"] < successor, saved


def rank_process(cluster: Cluster, name: str) -> int:
    """A process that trains on a node."""
    return next(
        pid
        for pid in cluster.processes(name, "-m slurm.rank")
        if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(sys.executable)
    )


def worker(run: Run) -> str:
    """A node of the job that is not its batch host."""
    hosts = run.cluster.run("scontrol", "show", "hostnames", run.cluster.job(run.number)["NodeList"]).split()
    return next(host for host in hosts if host != run.batch_host())


def ends_like(run: Run, undisturbed: Run) -> None:
    run.wait_for_end()
    assert run.curve() == undisturbed.curve()
    assert_no_stale_write(run)
    assert len(run.events("started")) >= 2
    assert run.history("end")[-1]["why"] == "finished"


def test_a_killed_rank(lab: Lab, undisturbed: Run) -> None:
    run = lab.submit("rank-killed")
    run.wait_for_step(12)
    struck = time.time()
    os.kill(rank_process(lab.cluster, worker(run)), signal.SIGKILL)
    ends_like(run, undisturbed)
    assert run.history("end")[0]["code"] == 128 + signal.SIGKILL
    report("a rank killed", run, struck)


@pytest.mark.parametrize("victim", ["worker", "batch host"])
def test_a_node_that_dies(lab: Lab, undisturbed: Run, faulty: Cluster, victim: str) -> None:
    run = lab.submit(f"dead-{victim.split()[0]}")
    run.wait_for_step(12)
    struck, name = time.time(), worker(run) if victim == "worker" else run.batch_host()
    faulty.crash_node(name)
    ends_like(run, undisturbed)
    assert name not in run.nodes()
    report(f"a node dead ({victim})", run, struck)


def test_a_node_that_is_cut_off_goes_on_and_cannot_commit(
    lab: Lab, undisturbed: Run, faulty: Cluster
) -> None:
    """Both ranks are on the node: what is cut off trains on at full speed, beside its replacement.

    The link is down for 40 s, and longer if the replacement needs longer to begin.
    """
    run = lab.submit("cut-off", "--nodes", "1", world__processes=2, steps=5000)
    log = run.path / "logs" / "rank-0.log"
    run.wait_for_step(7)
    struck, name = time.time(), run.batch_host()
    faulty.set_link(name, up=False)
    run.wait(lambda: "this one (start 1) may save no more" in log.read_text(), "the fence")
    goes_on_elsewhere(run, undisturbed, name, struck)
    report("a link down for 40 s, both ranks behind it", run, struck)


@pytest.mark.parametrize("victim", ["worker", "batch host"])
def test_a_link_that_is_down_for_a_while(lab: Lab, undisturbed: Run, faulty: Cluster, victim: str) -> None:
    """The ranks on both sides wait for each other; the one that is cut off breaks when the link is back, and
    what started it ends its step.
    """
    run = lab.submit(f"link-{victim.split()[0]}", steps=5000)
    run.wait_for_step(7)
    struck, name = time.time(), worker(run) if victim == "worker" else run.batch_host()
    stale = rank_process(faulty, name)
    faulty.set_link(name, up=False)
    goes_on_elsewhere(run, undisturbed, name, struck, stale)
    report(f"a link down for 40 s ({victim})", run, struck)


def goes_on_elsewhere(run: Run, undisturbed: Run, name: str, struck: float, stale: int | None = None) -> None:
    """The link of the node ``name`` comes back 40 s after it went, and the rank ``stale`` there dies; the
    next start is not disturbed by that.
    """
    cluster = run.cluster
    run.wait(lambda: len(run.events("started")) == 2, "the replacement")
    time.sleep(max(0.0, 40 - (time.time() - struck)))
    cluster.set_link(name, up=True)
    if stale is not None:
        kill(stale)
    stale_ranks = partial(cluster.processes, name, "-m slurm.rank")
    wait_until(lambda: not stale_ranks(), PATIENCE, "the end of the ranks that were cut off")
    wait_until(lambda: cluster.states()[name] == "IDLE", PATIENCE, "the node's return")
    run.wait_for_step(max(STEPS, run.metrics()[-1]["step"] + 2 * EVERY))
    assert run.cluster.job(run.number)["Restarts"] == "1"
    assert run.curve()[:STEPS] == undisturbed.curve()
    assert [line["step"] for line in run.metrics()] == list(range(len(run.metrics())))
    assert_no_stale_write(run)
    assert [event["start"] for event in run.events("started")] == [1, 2]


def test_preemption(lab: Lab, undisturbed: Run) -> None:
    run = lab.submit("preempted")
    run.wait_for_step(12)
    struck = time.time()
    lab.cluster.run("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap=sleep 5")
    ends_like(run, undisturbed)
    assert run.events("stopped")[0]["signal"] == "SIGUSR1"
    report("preempted, and 5 s of the other job", run, struck)


def test_the_time_limit(lab: Lab) -> None:
    """The controller looks every 30 s only: the warning comes between 40 and 70 s after the start. Nothing
    else saves, and what is computed after the limit is compared too.
    """
    rare = {"checkpoints__every_steps": 100_000}
    run = lab.submit("limited", site=lab.site(TIME_LIMIT="3", SAVE_SECONDS="110"), steps=5000, **rare)
    run.wait(lambda: len(run.events("started")) > 1, "the next start")
    stopped, second = run.events("stopped")[0], run.events("started")[1]
    run.wait_for_step(stopped["step"] + EVERY)
    lab.bitdance("cancel", str(run.path))
    saved, warned = run.events("saved")[0], run.history("end")[0]
    begun = datetime.fromisoformat(START.findall(run.log())[0]).timestamp()
    assert stopped["signal"] == "SIGUSR1" and stopped["time"] < begun + 180
    assert saved["step"] == stopped["step"] == second["step"] > 0
    assert (warned["code"], warned["again"], warned["step"]) == (75, True, stopped["step"])
    report("the time limit", run, stopped["time"])
    unlimited = lab.submit("unlimited", steps=len(run.curve()), **rare)
    unlimited.wait_for_end()
    assert run.curve() == unlimited.curve()


def test_a_dead_controller(lab: Lab, undisturbed: Run, faulty: Cluster) -> None:
    """Training does not need slurmctld; a rank that dies meanwhile is replaced when it is back."""
    run = lab.submit("headless")
    run.wait_for_step(12)
    victim = rank_process(faulty, worker(run))
    faulty.kill_controller()
    seen = len(run.metrics())
    wait_until(lambda: len(run.metrics()) > seen + 2, PATIENCE, "steps without a controller")
    os.kill(victim, signal.SIGKILL)
    time.sleep(10)
    struck = time.time()
    faulty.start_controller()
    ends_like(run, undisturbed)
    report("slurmctld dead, and a rank meanwhile (from its return)", run, struck)


def test_elastic(lab: Lab, undisturbed: Run) -> None:
    """On four nodes, then on two, then on three."""
    cluster = lab.cluster
    run = lab.submit("elastic", "--nodes", "2-4")
    try:
        for drained, resumed, until in (("n3,n4", None, 8), (None, "n3", 22)):
            run.wait_for_step(until)
            if drained:
                cluster.run("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
            if resumed:
                cluster.run("scontrol", "update", f"nodename={resumed}", "state=resume")
            cluster.run("scancel", "--batch", "--signal=USR1", str(run.number))
        run.wait_for_end()
    finally:
        cluster.run("scontrol", "update", "nodename=n4", "state=resume")
    assert [event["ranks"] for event in run.events("started")] == [4, 2, 3]
    for ours, theirs in zip(run.curve(), undisturbed.curve(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_cancel_saves_first(lab: Lab) -> None:
    run = lab.submit("cancelled", steps=5000)
    run.wait_for_step(12)
    done = lab.bitdance("cancel", str(run.path))
    assert done.returncode == 0 and "is saved" in done.stdout, done.stdout + done.stderr
    assert run.state() == "CANCELLED"
    stopped = run.events("stopped")[0]["step"]
    assert (Path(run.path) / "checkpoints" / f"step-{stopped}").is_dir()


def test_three_starts_without_progress_are_the_last(lab: Lab) -> None:
    """A rank that dies before it has saved, each time: the job does not come back for ever."""
    run = lab.submit("stuck", checkpoints__every_steps=1000, steps=1000)
    moments = random.Random(0)
    for start in range(1, 4):
        run.wait(lambda start=start: len(run.events("started")) == start, f"start {start}")
        time.sleep(moments.uniform(0, 2))
        os.kill(rank_process(lab.cluster, worker(run)), signal.SIGKILL)
    run.wait(run.over, "the end")
    assert run.state() == "FAILED"
    assert "three starts in a row never got past step 0" in run.log()
