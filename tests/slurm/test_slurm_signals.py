"""What signals do to a job's script, its step and what decides after it; the commands are stand-ins."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lone_scripts import ARGUMENTS, ELEMENT, begin, repository


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["script", "whole job"])
def test_a_signal_before_the_step_reaches_the_step(
    tmp_path: Path, name: str, sent: signal.Signals, whom: str
) -> None:
    """While the interpreter is asked; the node is not blamed for it."""
    told, record = tmp_path / "told", "JobId=12 ArrayTaskId=3 JobState=RUNNING Restarts=0 StdOut=x"
    commands = {
        "scontrol": f"#!/bin/bash\necho $1 >> {told}\necho {record}\n",
        "srun": "#!/bin/bash\ntrap 'exit 75' USR1 TERM\nfor _ in {1..100}; do sleep 0.05; done\n"
        f"echo whole >> {told}\n",
        "python": f'#!/bin/bash\n[ "$1" = -c ] || exit "${{@: -1}}"\ntouch {tmp_path}/asked\nsleep 0.3\n',
    }
    script = begin(tmp_path, name, commands, **ELEMENT)
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    (os.kill if whom == "script" else os.killpg)(script.pid, sent)
    said, _ = script.communicate(timeout=60)
    assert script.returncode in (75, 128 + signal.SIGUSR1)  # told, or ended by it before it could be told
    assert "bad node" not in said and not {"whole", "requeue"} & set(told.read_text().split())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_step_that_drops_signals_while_it_is_launched_is_told_again(tmp_path: Path, name: str) -> None:
    """srun does until its tasks run, and at a TERM it would kill them. What decides hears of it."""
    commands = {
        "scontrol": "#!/bin/sh\n",
        "srun": "#!/bin/bash\ntrap 'exit 99' TERM\ntrap : USR1\n"
        f"touch {tmp_path}/launches\nfor _ in {{1..10}}; do sleep 0.05; done\n"
        "trap 'exit 75' USR1\nfor _ in {1..100}; do sleep 0.05; done\n",
        "python": f'#!/bin/bash\n[ "$1" = -c ] && exit\necho "$*" > {tmp_path}/asked\nexit "${{@: -1}}"\n',
    }
    script = begin(tmp_path, name, commands, **ELEMENT)
    while not (tmp_path / "launches").exists():
        time.sleep(0.01)
    script.send_signal(signal.SIGUSR1)
    said, errors = script.communicate(timeout=60)
    assert script.returncode == 75 and (tmp_path / "asked").read_text().endswith(" --told --code 75\n")
    assert "illed" not in said + errors


@pytest.mark.parametrize(
    "line",
    [
        "set -euo pipefail",  # many scripts begin so
        "set -E; trap 'exit 9' ERR",
        "trap 'exit 9' ERR",
        "set -o posix",
        "sleep 50 > /dev/null 2>&1 &",
        "trap - USR1; trap 'exit 9' USR1",
    ],
)
def test_what_the_sites_lines_do_does_not_end_the_script_or_hold_it(tmp_path: Path, line: str) -> None:
    """The step's end would be that of the job, or its code lost."""
    commands = {
        "scontrol": "#!/bin/sh\nexit 1\n",  # so that it counts as a later start
        "srun": "#!/bin/bash\n[ $1 = --overlap ] && exit 1\ntrap '' USR1\nkill -USR1 $PPID\nsleep 0.2\n"
        f'echo "$4" > {tmp_path}/option\nexit 137\n',
        "python": '#!/bin/bash\n[ "$1" = -c ] || exit $((${@: -1} - 1))\n',
    }
    (repository(tmp_path) / "site.env").write_text(f"{line}\nIFS=,\nSRUN_OPTIONS='--one --two'\n")
    script = begin(tmp_path, "command", commands, SLURM_RESTART_COUNT="1")
    script.communicate(timeout=30)
    assert script.returncode == 136 and (tmp_path / "option").read_text() == "--one\n"
    with suppress(ProcessLookupError):
        os.killpg(script.pid, signal.SIGKILL)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_whole_job_does_not_end_what_decides(tmp_path: Path, sent: signal.Signals) -> None:
    """The interpreter that decides ignores signals, but not before it has imported what it needs."""
    commands = {
        "scontrol": "#!/bin/sh\n",
        "srun": "#!/bin/sh\nexit 75\n",
        "python": f'#!/bin/bash\n[ "$1" = -c ] && exit\ntouch {tmp_path}/decides\nsleep 0.3\nexit 75\n',
    }
    script = begin(tmp_path, "train", commands)
    while not (tmp_path / "decides").exists():
        time.sleep(0.01)
    os.killpg(script.pid, sent)
    said, errors = script.communicate(timeout=60)
    assert script.returncode == 75 and "illed" not in said + errors


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_step_that_a_signal_to_the_whole_job_ends_has_a_code(tmp_path: Path, sent: signal.Signals) -> None:
    """Bash, which may have told of its end already, says -1 instead, three times of four."""
    commands = {
        "scontrol": "#!/bin/sh\n",
        "srun": f"#!/bin/sh\ntouch {tmp_path}/runs\nexec sleep 20\n",
        "python": f'#!/bin/bash\n[ "$1" = -c ] || echo "${{@: -1}}" > {tmp_path}/code\n',
    }
    for _ in range(4):
        script = begin(tmp_path, "train", commands)
        while not (tmp_path / "runs").exists():
            time.sleep(0.01)
        time.sleep(0.1)  # until the script waits
        os.killpg(script.pid, sent)
        script.communicate(timeout=60)
        assert (tmp_path / "code").read_text() in ("138\n", "143\n")  # by the signal, or told by the script
        (tmp_path / "runs").unlink()


@pytest.mark.parametrize("end", ["kill -KILL $$", "kill -TERM $$", "kill -USR1 $$", "exit 1"])
def test_an_interpreter_that_a_signal_has_ended_is_not_a_bad_one(tmp_path: Path, end: str) -> None:
    """Of a rank: srun ends the others when one fails."""
    commands = {
        "scontrol": "#!/bin/sh\n",
        "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
        "python": f'#!/bin/bash\n[ "$2" = pass ] && {end}\n[ "$1" = -c ] || exit "${{@: -1}}"\n',
    }
    script = begin(tmp_path, "train", commands)
    said, _ = script.communicate(timeout=60)
    codes = {"KILL": 137, "TERM": 143, "USR1": 138}
    expected = next((code for name, code in codes.items() if name in end), 75)
    assert (script.returncode, "bad node n1" in said) == (expected, end == "exit 1")
