"""The batch scripts by themselves, with commands in the place of Slurm's and of Python."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}
ELEMENT = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
ARGUMENTS = {"train": ["r.yaml"], "tokenize": ["r.yaml", "4"], "export": ["a", "b"], "command": ["data"]}


def repository(folder: Path) -> Path:
    """The scripts in ``folder``, as in a clone that is not yet made a site's."""
    scripts = folder / "slurm"
    scripts.mkdir(exist_ok=True)
    for path in [*(ROOT / "slurm").glob("*.sbatch"), ROOT / "slurm" / "job.bash"]:
        shutil.copy(path, scripts)
    return scripts


def begin(
    folder: Path,
    name: str,
    commands: dict[str, str],
    arguments: list[str] | None = None,
    log: IO[str] | int = subprocess.PIPE,
    **variables: str,
) -> subprocess.Popen[str]:
    """Begin a job's script in ``folder``, with commands there in the place of Slurm's and of Python."""
    for command, text in commands.items():
        (folder / command).write_text(text)
        (folder / command).chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": f"{folder}/python"}
    return subprocess.Popen(
        ["bash", repository(folder) / f"{name}.sbatch", *(arguments or ARGUMENTS[name])],
        cwd=folder,
        env=os.environ | JOB | own | variables,
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )
