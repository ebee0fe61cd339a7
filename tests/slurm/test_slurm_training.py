"""Training jobs on a real Slurm: submitted, disturbed in all the ways of a cluster, and unmoved."""

import re
import time

from slurm_runs import STEPS, Lab, Run


def test_a_submitted_run_of_two_nodes_ends_with_its_export(undisturbed: Run) -> None:
    assert [line["step"] for line in undisturbed.metrics()] == list(range(STEPS))
    assert (undisturbed.path / "export" / "export.json").exists()
    assert re.fullmatch(r"n\[[1-4][-,][1-4]\]", undisturbed.history("start")[0]["nodes"])
    assert "preflight of 2 nodes passed" in undisturbed.log()
    assert undisturbed.history("end")[0]["why"] == "finished"


def test_a_warning_saves_and_the_job_goes_on_where_it_was(lab: Lab, undisturbed: Run) -> None:
    run = lab.submit("warned")
    run.wait_for_step(12)
    warned = time.time()
    lab.cluster.run("scancel", "--batch", "--signal=USR1", str(run.number))
    run.wait_for_end()
    assert run.curve() == undisturbed.curve()
    assert [end["code"] for end in run.history("end")] == [75, 0]
    (stopped,) = run.events("stopped")
    _first, second = run.events("started")
    assert second["step"] == stopped["step"]  # nothing was done twice
    print(f"USR1: training again after {second['time'] - warned:.1f} s")
