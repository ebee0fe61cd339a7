"""The batch scripts by themselves, with commands in Slurm's place that write down what they are told."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}
ELEMENT = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
ARGUMENTS = {"train": ["r.yaml"], "tokenize": ["r.yaml", "4"], "export": ["a", "b"], "command": ["data"]}
SCONTROL = """#!/bin/bash
echo "$*" >> {told}
[ "$1" = show ] && echo "JobId=12 ReqNodeList=(null) ExcNodeList=n7 StdOut=x"
[ "$1" = requeue ] && kill -TERM 0
exit 0
"""


def run_script(folder: Path, name: str) -> tuple[int, list[str]]:
    """One start of a script on a node without the interpreter: its exit code, and what it told scontrol."""
    told, log = folder / "told", folder / "log"
    told.write_text("")
    for command, text in (("scontrol", SCONTROL.format(told=told)), ("srun", "#!/bin/sh\nexit 99\n")):
        (folder / command).write_text(text)
        (folder / command).chmod(0o755)
    environment = os.environ | JOB | (ELEMENT if name == "tokenize" else {})
    with open(log, "a") as file:
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), *ARGUMENTS[name]],
            cwd=folder,
            env=environment | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "/no/python"},
            stdout=file,
            stderr=file,
            start_new_session=True,
            timeout=60,
            check=False,
        )
    return done.returncode, told.read_text().splitlines()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_node_without_the_interpreter_is_left_out_and_three_starts_of_it_are_the_last(
    tmp_path: Path, name: str
) -> None:
    """The requeue ends what belongs to the job; the exclusion must be told nevertheless."""
    job = "9_3" if name == "tokenize" else "12"
    told = [f"show job {job} --oneliner", f"requeue {job}", f"update JobId={job} ExcNodeList=n7,n1"]
    log = tmp_path / "log"
    for _ in range(2):
        assert run_script(tmp_path, name) == (75, told)
    log.write_text(log.read_text() + "bitdance: start 2 of job 12 on n2\n")  # a node that had it
    for _ in range(2):
        assert run_script(tmp_path, name) == (75, told)
    assert run_script(tmp_path, name) == (78, [])
    assert "bitdance: bad node n1: there is no /no/python" in log.read_text()


def test_the_requeue_reaches_a_command_that_does_not_ignore_it(tmp_path: Path) -> None:
    """What the test above stands on: the stand-in's signal ends its own group."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL.format(told=tmp_path / "told"))
    scontrol.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"{scontrol} requeue 12; {scontrol} update"], start_new_session=True, check=False
    )
    assert done.returncode == -signal.SIGTERM
    assert (tmp_path / "told").read_text() == "requeue 12\n"


def publish(folder: Path) -> tuple[int, str]:
    """One start of the export's script, where each command succeeds: its exit code, and what was done."""
    texts = {
        "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
        "python": f'#!/bin/bash\n[ "$2" = slurm.after ] && exit "$4"\necho "$3" >> {folder}/done\n'
        '[ "$3" = export ] && mkdir "$5"\nexit 0\n',
    }
    for command, text in texts.items():
        (folder / command).write_text(text)
        (folder / command).chmod(0o755)
    (folder / "done").write_text("")
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "export.sbatch"), "run/export", "published/", "--prompt", "a cat"],
        cwd=folder,
        env=os.environ | JOB | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": f"{folder}/python"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, (folder / "done").read_text() + done.stdout


def test_a_model_is_published_once_and_never_for_another_one(tmp_path: Path) -> None:
    manifest = tmp_path / "run" / "export" / "export.json"
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
