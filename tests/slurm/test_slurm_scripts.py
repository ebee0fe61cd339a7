"""The batch scripts by themselves, with commands in Slurm's place that write down what they are told."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lone_scripts import ARGUMENTS, ELEMENT, ROOT, begin, repository

from slurm.script import fill_in

SCONTROL = """#!/bin/bash
[ "$1" = update ] && kill -TERM 0
echo "$*" >> {told}
[ "$1" = show ] && echo "JobId=12 {array}JobState={state} Restarts=1 ExcNodeList=n7 StdOut=x"
[ "$1" = requeue ] && kill -TERM 0
exit 0
"""


def run_script(folder: Path, name: str, python: str, state: str = "RUNNING") -> tuple[int, list[str]]:
    """One start of a script on a node with a bad interpreter: its exit code, and what it told scontrol."""
    told, log = folder / "told", folder / "log"
    told.write_text("")
    array = "ArrayTaskId=3 " if name == "tokenize" else ""
    scontrol = SCONTROL.format(told=told, array=array, state=state)
    commands = {"scontrol": scontrol, "srun": "#!/bin/sh\nexit 99\n"}
    element = ELEMENT if name == "tokenize" else {}
    with open(log, "a") as file:
        script = begin(folder, name, commands, log=file, PYTHON=python, SLURM_RESTART_COUNT="1", **element)
        code = script.wait(timeout=60)
    return code, told.read_text().splitlines()


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("/no/python", "/no/python: No such file or directory"),
        ("{folder}/bare/python", "ModuleNotFoundError: No module named "),
        ("{folder}/broken/python", "python: libpython3.so: cannot open shared object file"),
    ],
)
def test_a_node_without_the_interpreter_is_left_out_and_three_starts_of_it_are_the_last(
    tmp_path: Path, name: str, python: str, words: str
) -> None:
    """The requeue ends what belongs to the job; the exclusion must be told nevertheless."""
    job = "9_3" if name == "tokenize" else "12"
    python = python.format(folder=tmp_path)
    broken = 'echo "python: libpython3.so: cannot open shared object file" >&2; exit 127'
    for kind, line in (("bare", f'exec {sys.executable} -S "$@"'), ("broken", broken)):
        path = tmp_path / kind / "python"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    asked = ["show job 12 --oneliner", f"show job {job} --oneliner"]
    told = [*asked, f"requeue {job}", f"update JobId={job} ExcNodeList=n7,n1"]
    log = tmp_path / "log"
    for _ in range(2):
        assert run_script(tmp_path, name, python) == (75, told)
    log.write_text(log.read_text() + "bitdance: start 2 of job 12 on n2\n")  # a node that had it
    for _ in range(2):
        assert run_script(tmp_path, name, python) == (75, told)
    assert run_script(tmp_path, name, python) == (78, asked)
    assert re.search(
        rf"^bitdance: bad node n1: no working {python}: .*{words}", log.read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_script_that_is_submitted_elsewhere_says_so(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "slurm" / f"{name}.sbatch", *ARGUMENTS[name]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert f"submit in the root of the repository, not in {tmp_path}" in done.stdout


def test_an_array_script_that_is_submitted_as_one_job_says_so(tmp_path: Path) -> None:
    said = "#!/bin/sh\necho JobId=12 Restarts=0\n"
    script = begin(tmp_path, "tokenize", {"scontrol": said, "srun": said}, PYTHON="/bin/true")
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 1 and "usage: sbatch --array=0-39 slurm/tokenize.sbatch" in errors


def test_the_requeue_reaches_a_command_that_does_not_ignore_it(tmp_path: Path) -> None:
    """What the test above stands on: the stand-in's signal ends its own group."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL.format(told=tmp_path / "told", array="", state="RUNNING"))
    scontrol.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"{scontrol} requeue 12; {scontrol} update"], start_new_session=True, check=False
    )
    assert done.returncode == -signal.SIGTERM
    assert (tmp_path / "told").read_text() == "requeue 12\n"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_job_that_was_cancelled_is_not_put_back_for_a_bad_node(tmp_path: Path, name: str) -> None:
    """Slurm would take it: a requeue is for jobs that have ended, too."""
    code, told = run_script(tmp_path, name, "/no/python", state="CANCELLED")
    assert code == 75 and all(line.startswith("show ") for line in told)


def test_a_bad_node_is_left_when_the_controller_is_back(tmp_path: Path) -> None:
    """It is away at the first question of each kind. The log says meanwhile what is wrong with the node."""
    told = tmp_path / "told"
    scontrol = (
        f'#!/bin/sh\necho "$1" >> {told}\nmkdir {tmp_path}/"$1" 2> /dev/null && echo'
        " 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2 && exit 1\n"
        f'[ "$1" = show ] && echo JobId=12 JobState=RUNNING Restarts=0 ExcNodeList=n7 StdOut=x\n'
        f'[ "$1" = update ] && echo "$3" >> {told}\nexit 0\n'
    )
    with open(tmp_path / "log", "w") as log:
        commands = {"scontrol": scontrol, "srun": "#!/bin/sh\n"}
        script = begin(tmp_path, "train", commands, log=log, PYTHON="/no/python")
        assert script.wait(timeout=60) == 75
    asked = ["show", "show", "requeue", "requeue", "update", "update", "ExcNodeList=n7,n1"]
    assert told.read_text().splitlines() == asked
    said = (tmp_path / "log").read_text()
    words = re.findall(r"^(when .* leaves|bitdance: bad node) n1: no working /no/python", said, re.MULTILINE)
    assert words == ["when Slurm's controller answers again, the job leaves", "bitdance: bad node"]


def test_a_controller_that_does_not_know_the_job_is_not_waited_for(tmp_path: Path) -> None:
    commands = {"scontrol": "#!/bin/sh\necho Invalid job id specified >&2\nexit 1\n", "srun": "#!/bin/sh\n"}
    script = begin(tmp_path, "train", commands, PYTHON="/no/python")
    script.communicate(timeout=60)
    assert script.returncode == 75


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_sites_lines_may_use_what_is_not_set(tmp_path: Path, name: str) -> None:
    """As those of modules and environments do; in the scripts' own lines it is a mistake."""
    options = {"partition": "main"}
    script = fill_in(f"{name}.sbatch", options, "export OURS=/lib:$OF_NOBODY\necho read $OURS\nexit 3\n")
    done = subprocess.run(
        ["bash", "-c", script, name, *ARGUMENTS[name]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "read /lib:\n", "")
    assert script.index("end site") < script.index("\nbegin_start\n")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_the_site_exports_reaches_the_commands(name: str) -> None:
    """Also where sbatch has been told to hand nothing on, and has told srun the same (SLURM_EXPORT_ENV)."""
    steps = re.findall(r"^srun (?:.*\\\n)*.*", (ROOT / "slurm" / f"{name}.sbatch").read_text(), re.MULTILINE)
    assert len(steps) == 1 and re.search(r"--export=ALL \${SRUN_OPTIONS:-} ", steps[0])


FOREIGN = {"SLURM_RESTART_COUNT": "3", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1"}
FOREIGN |= {
    "SLURM_GPUS": "2",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_ARRAY_JOB_ID": "55",
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_MEM_PER_CPU": "100",
}


@pytest.mark.parametrize("name", ["train", "export", "command"])
@pytest.mark.parametrize(
    "record",
    [
        "Restarts=0 X=y NtasksPerN:B:S:C=0:0:*:* TresPerTask=cpu=8 CpusPerTask=gpu",
        "Restarts=3 NtasksPerN:B:S:C=4:0:*:* TresPerJob=gres:gpu:2 TresPerTask=cpu=8,gres/gpu=1",
    ],
)
def test_what_the_shell_was_in_a_job_of_its_own_does_not_count(
    tmp_path: Path, name: str, record: str
) -> None:
    """A first start of a job by plain sbatch in another job, and a fourth one whose variables are its own."""
    commands = {
        "scontrol": f"#!/bin/sh\n[ $2 = job ] && echo 'JobId=12 JobName=a {record} StdOut=x'\n",
        "srun": f'#!/bin/bash\necho "$*" >> {tmp_path}/steps\n',
        "python": f"#!/bin/sh\nenv | grep ^SLURM > {tmp_path}/left\n",
    }
    script = begin(tmp_path, name, commands, **FOREIGN)
    said, errors = script.communicate(timeout=60)
    assert script.returncode == 0, errors
    own, steps = "Restarts=3" in record, (tmp_path / "steps").read_text().splitlines()
    left = dict(line.split("=", 1) for line in (tmp_path / "left").read_text().splitlines())
    empty = [step for step in steps if step.startswith("--overlap")]
    assert (left.get("SLURM_RESTART_COUNT"), len(empty)) == (("3", 3) if own else (None, 0))
    assert f"start {3 if own else 0} of job 12" in said
    gpus = {"SLURM_GPUS", "SLURM_GPUS_PER_TASK"}
    assert left.keys() & gpus == (gpus if own else set())
    assert not left.keys() & {
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_CPU_BIND",
        "SLURM_MEM_PER_CPU",
    }
    if name == "train":
        assert f"--ntasks-per-node={4 if own else 1} --ntasks={4 if own else 1} " in steps[-1]


def test_the_ranks_are_told_the_network_interface(tmp_path: Path) -> None:
    """Of the site file, for both libraries."""
    names = "^(NCCL|GLOO)_SOCKET_IFNAME="
    commands = {
        "scontrol": "#!/bin/sh\n[ $2 = job ] && echo 'JobId=12 Restarts=0 StdOut=x'\n",
        "srun": f"#!/bin/bash\nenv | grep -E '{names}' | sort > {tmp_path}/told\n",
        "python": "#!/bin/sh\n",
    }
    (repository(tmp_path) / "site.env").write_text("NETWORK_INTERFACE=ib7\n")
    script = begin(tmp_path, "train", commands)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 0, errors
    assert (tmp_path / "told").read_text() == "GLOO_SOCKET_IFNAME=ib7\nNCCL_SOCKET_IFNAME=ib7\n"


def publish(folder: Path) -> tuple[int, str]:
    """One start of the export's script, where each command succeeds: its exit code, and what was done."""
    commands = {
        "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
        "python": '#!/bin/bash\n[ "$1" = -c ] && exit\n[ "$2" = slurm.after ] && exit "$4"\n'
        f'echo "$3" >> {folder}/done\n[ "$3" = export ] && mkdir "$5"\nexit 0\n',
    }
    (folder / "done").write_text("")
    script = begin(folder, "export", commands, ["run/export", "published/", "--prompt", "a cat"])
    said, _ = script.communicate(timeout=60)
    return script.returncode, (folder / "done").read_text() + said


def test_a_model_is_published_once_and_never_for_another_one(tmp_path: Path) -> None:
    manifest = tmp_path / "run" / "export" / "export.json"
    code, said = publish(tmp_path)
    assert code == 65 and "run/export is no export: it has no export.json" in said
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"step": 6}')
    code, said = publish(tmp_path)
    assert code == 0 and said.startswith("export\ngenerate\n")
    code, said = publish(tmp_path)  # put back into the queue
    assert code == 0 and said.startswith("generate\n")
    manifest.write_text('{"step": 7}')
    code, said = publish(tmp_path)
    assert code == 78 and "published is there already, and is not made of run/export" in said
    assert "generate" not in said
