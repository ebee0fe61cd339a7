"""What is decided without a cluster: after a start's end, about nodes, and how Slurm's words are read."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundation.errors import DataError, ExitCode
from slurm import follow, start, states
from slurm.after import BAD_NODE, Decision, Start, decide, run_of, traces_of
from slurm.checks import gpus_of, node_range, seconds_of
from slurm.controller import fields
from slurm.follow import duration, last_line
from slurm.history import JobFolder
from slurm.node_checks import Limits, Report, appears, check_latents
from slurm.preflight import announce, compare_facts, judge
from slurm.script import SCRIPTS, fill_in
from trainer.run_folder import RunFolder, take_start


def end(path: Path, code: int, log: str = "", restart: int = 0) -> Decision:
    run = RunFolder(path)
    run.starts.mkdir(parents=True, exist_ok=True)
    return decide(Start(7, restart, "n[1-2]", code), log, run, JobFolder.of_run(path))


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (65, False), (78, False), (75, True), (70, True), (137, True), (1, True)]
)
def test_which_ends_are_final(tmp_path: Path, code: int, again: bool) -> None:
    assert end(tmp_path, code).again is again


def test_bad_nodes_are_those_that_this_start_has_named(tmp_path: Path) -> None:
    log = (
        "bitdance: start 0 of job 7\nbitdance: bad node n1: old\n"
        "bitdance: start 1 of job 7\nnoise\nbitdance: bad node n2: 0.1 GB are free in /tmp, 2 are needed\n"
    )
    decision = end(tmp_path, 75, log)
    assert decision.again and decision.without == ("n2",)
    assert decision.why == "n2: 0.1 GB are free in /tmp, 2 are needed"


def test_a_bad_node_is_found_where_srun_labels_the_lines(tmp_path: Path) -> None:
    decision = end(tmp_path, 75, "bitdance: start 0\n 3: bitdance: bad node n2: no disk\n0: noise\n")
    assert decision.again and decision.without == ("n2",)


def test_starts_that_were_told_to_stop_before_they_could_save_do_not_count(tmp_path: Path) -> None:
    """Nothing catches the signal yet, or srun ends the others when the first has gone."""
    run, history = RunFolder(tmp_path), JobFolder.of_run(tmp_path)
    for code in (138, 143, 137, 75):
        decision = decide(Start(7, 0, "n1", code, told=True), "", run, history)
        assert decision.again
        history.note("end", 7, code=code, step=0, again=True, why=decision.why, told=True)
    assert decide(Start(7, 0, "n1", 137), "", run, history).again
    for code in (137, 137):  # nor do they part what counts
        history.note("end", 7, code=code, step=0, told=False)
        history.note("end", 7, code=75, step=0, told=True)
    assert not decide(Start(7, 0, "n1", 137), "", run, history).again


@pytest.mark.parametrize("code", [75, 138, 143])
def test_starts_that_nobody_told_to_stop_do_count(tmp_path: Path, code: int) -> None:
    """Whatever they end with: else a job would be put back for ever."""
    run, history = RunFolder(tmp_path), JobFolder.of_run(tmp_path)
    for _ in range(2):
        assert decide(Start(7, 0, "n1", code), "", run, history).again
        history.note("end", 7, code=code, step=0, told=False)
    last = decide(Start(7, 0, "n1", code), "", run, history)
    assert (last.again, last.code) == (False, ExitCode.BUG)


def test_what_all_nodes_of_a_start_say_ends_the_job(tmp_path: Path) -> None:
    said = "bitdance: bad node n1: no working /x/python\nbitdance: bad node n2: no working /x/python\n"
    run, history = RunFolder(tmp_path), JobFolder.of_run(tmp_path)
    both, more = Start(7, 0, "n[1-2]", 75, count=2), Start(7, 0, "n[1-3]", 75, count=3)
    decision = decide(both, said, run, history)
    assert (decision.again, decision.code) == (False, ExitCode.RECIPE)
    assert decision.why == "all 2 nodes say: no working /x/python"
    assert decide(more, said, run, history).without == ("n1", "n2")
    assert decide(both, said.replace("n2: no", "n2: another"), run, history).again


def test_what_three_starts_on_other_nodes_say_ends_the_job(tmp_path: Path) -> None:
    """One node cannot tell whether it is to blame; three can. Another reason, or another job, begins anew."""
    run, history = RunFolder(tmp_path), JobFolder.of_run(tmp_path)

    def one(job: int, reason: str) -> Decision:
        decision = decide(Start(job, 0, "n1", 75), f"bitdance: bad node n1: {reason}\n", run, history)
        history.note("end", job, code=75, step=0, reasons=list(decision.reasons))
        return decision

    memory = "{} GB of memory are available, 900 needed"
    for job, reason in (
        (6, memory),
        (6, memory),
        (7, memory),
        (7, "it sees no data"),
        (7, memory),
        (7, memory),
    ):
        assert one(job, reason.format(job / 7)).again
    last = one(7, memory.format(5.5))
    assert (last.again, last.code) == (False, ExitCode.RECIPE)
    assert last.why == f"three starts in a row, each on other nodes, say: {memory.format(5.5)}"


def test_a_node_whose_python_is_another_one_is_named(tmp_path: Path) -> None:
    program = "import sys; sys.modules['pydantic'] = None; from slurm.rank import main; sys.exit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"SLURMD_NODENAME": "n3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.REQUEUE, done.stderr
    ((node, reason),) = BAD_NODE.findall(done.stdout)
    assert node == "n3" and sys.executable in reason and "pydantic" in reason


def test_three_starts_without_progress_are_the_last(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.starts.mkdir()
    for _ in range(3):
        assert end(tmp_path, 137).again
        JobFolder.of_run(tmp_path).note("start", 7)
        take_start(run, 0, 2)
    assert not end(tmp_path, 137).again


def test_a_new_job_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three starts of job 7 that came no further, by its ends and by the run's starts."""
    run, history = RunFolder(tmp_path), JobFolder.of_run(tmp_path)
    run.starts.mkdir()
    for job in (7, 8):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        for restart in range(3):
            history.note("start", job)
            assert not start._makes_no_progress(run)
            take_start(run, 0, 2, despite_no_progress=True)
            decision = decide(Start(job, restart, "n1", 137), "", run, history)
            assert decision.again is (restart < 2)
            history.note("end", job, code=137, step=0)
        assert start._makes_no_progress(run)


def test_a_job_that_slurm_holds_is_told_with_what_lets_it_go(tmp_path: Path) -> None:
    JobFolder.of_run(tmp_path).note("submitted", 7)
    held = {"JobState": "PENDING", "Reason": "launch_failed_requeued_held", "UserId": "another(7)"}
    (row,) = follow.rows([tmp_path], {7: [held]})
    assert "a node could not start it; `scontrol release 7` lets it go on" in row.why


def test_ends_before_the_first_step_are_counted_too(tmp_path: Path) -> None:
    history = JobFolder.of_run(tmp_path)
    for _ in range(2):
        assert end(tmp_path, 1).again
        history.note("end", 7, code=1, step=0)
    told = Start(7, 0, "n1", 75, told=True)
    assert decide(told, "", RunFolder(tmp_path), history).again  # saved: that is no failure
    decision = end(tmp_path, 1)
    assert not decision.again and decision.code == ExitCode.BUG


def test_a_command_is_run_again_five_times() -> None:
    log = "bitdance: start 0 of job 7\n"
    for restart, code in enumerate([137, 75, 1, 138, 143]):
        for told in (True, False):  # told as often as need be
            decision = decide(Start(7, 2 * restart, "n1", code, told=told), log, None, None)
            assert decision.again
            log += f"bitdance: again: {decision.why}\nbitdance: start {restart}\n"
    last = decide(Start(7, 9, "n1", 75), log, None, None)
    assert (last.again, last.code) == (False, ExitCode.BUG)
    assert last.why == "saved, wants to go on, after 5 failures"
    own = "bitdance: start 5 of job 7\n"
    for elsewhere in ("", own):  # the log, or what it had of the starts before
        assert not decide(Start(7, 5, "n1", 137), elsewhere, None, None).again
    assert decide(Start(8, 0, "n1", 137), log, None, None).again  # another job's
    assert not decide(Start(7, 0, "n1", 70), "", None, None).again


def test_the_run_is_known_though_the_recipe_is_of_another_version(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: runs/a\nunheard_of: 1\n")
    assert run_of(str(recipe), []) == Path("runs/a")
    assert run_of(str(recipe), ["steps=3", "run=runs/b"]) == Path("runs/b")
    assert run_of(str(recipe), ["run=runs/b", 'run="runs/c"']) == Path("runs/c")
    assert run_of(str(tmp_path / "none.yaml"), []) is None


def reports(**facts: list[str]) -> list[Report]:
    count = len(next(iter(facts.values())))
    return [Report(f"n{i}", i, facts={key: facts[key][i] for key in facts}) for i in range(count)]


def test_the_node_that_differs_is_blamed() -> None:
    found = reports(python=["3.11", "3.12", "3.11"], packages=["a 1, b 2", "a 1, b 2", "a 1, b 3"])
    compare_facts(found)
    verdict = judge(found, ["n0", "n1", "n2"], "")
    assert verdict.bad == {
        "n1": ["python is 3.12 there, 3.11 on the others"],
        "n2": ["it has other versions than the others: b 3"],
    }


def test_what_all_nodes_say_is_not_the_nodes_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One node cannot tell; all that is said counts, not the last of it alone."""
    run = RunFolder(tmp_path)

    def again(bad: int, nodes: int, own: str = "it sees no data") -> bool:
        found = [Report(f"n{i}", i, [own.format(i), "it is full"]) for i in range(bad)]
        announce(judge(found, [f"n{i}" for i in range(nodes)], ""))
        ended = Start(7, 0, f"n[0-{nodes - 1}]", 75, count=nodes)
        return decide(ended, capsys.readouterr().out, run, JobFolder.of_run(tmp_path)).again

    assert not again(3, 3) and not again(2, 2)
    assert again(1, 1) and again(2, 3) and again(3, 3, own="port {} is taken")


def test_a_file_of_another_node_is_waited_for(tmp_path: Path) -> None:
    assert not appears(tmp_path / "none", 0.3)
    assert not appears(tmp_path / "none" / "deeper", 5)
    started = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; touch {tmp_path}/token"])
    assert appears(tmp_path / "token", 10) and time.monotonic() - started < 5


def test_limits_have_an_option_each() -> None:
    example = (SCRIPTS / "site.example.env").read_text()
    for option in re.findall(r"--(m[a-z-]+) ", example.partition("PREFLIGHT_OPTIONS")[2].splitlines()[0]):
        assert hasattr(Limits(), option.replace("-", "_"))


def test_scontrol_is_read_with_spaces_in_values() -> None:
    line = "JobId=7 JobName=a b=c d NodeList=n[1-2] Reason=Node Fail Gres=gpu:h100:8(S:0-1)"
    read = fields(line.replace("b=c ", ""))
    assert read == {
        "JobId": "7",
        "JobName": "a d",
        "NodeList": "n[1-2]",
        "Reason": "Node Fail",
        "Gres": "gpu:h100:8(S:0-1)",
    }
    assert gpus_of(read) == 8 and gpus_of({"Gres": "gpu:4,shard:8"}) == 4 and gpus_of({}) == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("2-12", 216000), ("1-00:30:00", 88200)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
    assert seconds_of("UNLIMITED") is None


def test_numbers_of_nodes() -> None:
    assert node_range("4") == (4, 4) and node_range("2-4") == (2, 4)
    assert node_range("4-2") is None and node_range("0") is None and node_range("all") is None


def test_a_script_is_filled_in(tmp_path: Path) -> None:
    options = {"partition": "main", "gpus-per-node": None, "comment": "a b", "exclusive": "", "nodes": "3"}
    text = fill_in("train.sbatch", options, "PYTHON=/x/python\n")
    lines = text.splitlines()
    assert "#SBATCH --partition=main" in lines and "#SBATCH --comment='a b'" in lines
    assert "#SBATCH --exclusive" in lines and "#SBATCH --nodes=3" in lines
    assert "#SBATCH --gpus-per-node" not in text and "# SITE" not in text
    assert "slurm/site.env ]" not in text and "PYTHON=/x/python" in lines
    path = tmp_path / "script"
    path.write_text(text)
    assert os.system(f"bash -n {path}") == 0
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    last_option = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_option < first_command  # sbatch reads no further


def test_the_last_line_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) == {}
    path.write_text("".join(json.dumps({"step": n, "x": "y" * 100}) + "\n" for n in range(2000)) + '{"ste')
    assert last_line(path)["step"] == 1999


def test_durations() -> None:
    assert [duration(s) for s in (8, 250, 7500, 273600)] == ["8 s", "4 min 10 s", "2 h 05 min", "3 d 4 h"]


def test_a_dataset_that_cannot_be_reached_is_a_problem_of_the_node(tmp_path: Path) -> None:
    for latents, words in ((str(tmp_path), "has no manifest.json"), ("nostore://x", "cannot be read")):
        report = Report("n1", 0)
        check_latents(report, latents)
        assert len(report.problems) == 1 and words in report.problems[0]
    (tmp_path / "manifest.json").write_text("{}")
    check_latents(report := Report("n1", 0), str(tmp_path))
    assert not report.problems and len(report.facts["latents"]) == 12


def dataset_jobs(tmp_path: Path) -> JobFolder:
    """Of a dataset: an array, and what finishes the dataset after it; an older array too."""
    folder = JobFolder.beside(tmp_path / "latents")
    for number, after in ((3, None), (4, 3), (11, 10), (12, 11)):
        folder.note("submitted", number, after=after)
    return folder


def test_an_array_and_what_finishes_its_dataset_are_one_submission(tmp_path: Path) -> None:
    assert dataset_jobs(tmp_path).jobs() == [11, 12]
    run = JobFolder.of_run(tmp_path)
    assert run.jobs() == []
    run.note("submitted", 7, after=6)
    run.note("start", 7)
    assert run.jobs() == [7]
    run.note("start", 8)  # given to plain sbatch
    assert run.jobs() == [8]


@pytest.mark.parametrize(
    ("array", "finalize", "focus"),
    [
        (["COMPLETED", "RUNNING"], ["PENDING"], 11),
        (["COMPLETED", "COMPLETED"], ["RUNNING"], 12),
        (["COMPLETED", "FAILED"], ["CANCELLED"], 11),
        (["COMPLETED", "COMPLETED"], ["COMPLETED"], 12),
        ([], [], 12),
    ],
)
def test_news_are_of_the_job_that_is_live_or_has_failed(
    tmp_path: Path, array: list[str], finalize: list[str], focus: int
) -> None:
    known = {11: [{"JobState": state} for state in array], 12: [{"JobState": s} for s in finalize]}
    assert states.job_in_focus(dataset_jobs(tmp_path), known) == focus
    # One that was submitted earlier and is live still is told of before all that have ended.
    known[4] = [{"JobState": "RUNNING"}]
    assert states.job_in_focus(dataset_jobs(tmp_path), known) == 4


def test_cancel_ends_an_array_and_what_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = dataset_jobs(tmp_path), list[tuple[str, ...]]()
    folder.note("submitted", 13, after=None)  # a later one: what else is live is cancelled too
    states = {11: "RUNNING", 12: "PENDING", 13: "COMPLETED", 14: "RUNNING"}
    monkeypatch.setattr(follow, "all_jobs", lambda: {job: [{"JobState": states[job]}] for job in states})
    monkeypatch.setattr(follow, "slurm", lambda *command: said.append(command))
    follow.cancel(tmp_path / "latents", patience=0)
    assert said == [("scancel", "11"), ("scancel", "12")]
    assert [line["job"] for line in folder.lines("cancel")] == [11, 12]


def test_the_log_is_the_one_that_was_written_last(tmp_path: Path) -> None:
    folder = dataset_jobs(tmp_path)
    with pytest.raises(DataError, match="has not started yet"):
        follow.log_path(tmp_path / "latents", None)
    for age, name in enumerate(("11_1.log", "11_0.log", "4.log")):
        (folder.path / name).write_text("")
        os.utime(folder.path / name, (1e9 - age, 1e9 - age))
    assert follow.log_path(tmp_path / "latents", None).name == "11_1.log"
    (folder.path / "12.log").write_text("")
    assert follow.log_path(tmp_path / "latents", None).name == "12.log"


def test_what_slurm_has_forgotten_is_asked_of_sacct_then_of_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset_jobs(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states.state_of(12, folder, {})["JobState"] == "UNKNOWN"
    folder.note("end", 12, code=0, nodes="n2", restart=1)
    found = states.state_of(12, folder, {})
    assert (found["JobState"], found["NodeList"], found["Restarts"]) == ("COMPLETED", "n2", "1")
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'CANCELLED by 7|n[1-2]'\n")
    (tmp_path / "sacct").chmod(0o755)
    assert states.state_of(12, folder, {}) == {"JobState": "CANCELLED", "NodeList": "n[1-2]"}
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'COMPLETED|n1'; echo 'FAILED|n2'; echo 'COMPLETED|n1'\n")
    assert states.state_of(11, folder, {})["JobState"] == "2 COMPLETED, 1 FAILED"


def test_the_end_of_a_data_job_is_written_beside_its_output(tmp_path: Path) -> None:
    folder = JobFolder.beside(tmp_path / "latents")
    start, job = Start(12, 0, "n1", 0, "12"), {"Comment": f"bitdance {folder.path}"}
    assert traces_of(start, job) == folder
    assert JobFolder.beside("s3://bucket/latents").path == Path("data/bucket/latents.slurm")
    assert traces_of(start, {}) is None and traces_of(Start(11, 0, "n1", 0, "11_3"), job) is None
