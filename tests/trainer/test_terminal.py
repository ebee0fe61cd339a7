"""What a person sees of a rank: on a terminal a bar, elsewhere plain lines, and errors on standard error."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from trainer.terminal import Terminal
terminal = Terminal(Path(sys.argv[1]), echo=sys.argv[2] == "echo")
for step in (1, 2, 3):
    print(f"line {step}", flush=True)
    terminal.show_step(step, 3, f"loss {step}.5")
print("from a library", file=sys.stderr, flush=True)
terminal.complain("something is wrong")
"""


def command(log: Path, echo: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(log), echo]


def test_on_a_terminal_there_is_a_bar_and_the_log_has_plain_lines(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        command(tmp_path / "log", "echo"), stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # what a terminal says when its last writer has gone
        while part := os.read(ours, 65536):
            seen += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    shown = seen.decode()
    assert "3/3" in shown and "━" in shown and "loss 3.5" in shown and "error: something is wrong" in shown
    assert all(f"line {step}" in shown for step in (1, 2, 3))
    assert (tmp_path / "log").read_text() == "line 1\nline 2\nline 3\nfrom a library\n"


def test_elsewhere_there_are_plain_lines_and_errors_on_stderr(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for echo, shown in (("echo", "line 1\nline 2\nline 3\n"), ("no", "")):
        log = tmp_path / echo
        done = subprocess.run(
            command(log, echo), capture_output=True, text=True, env=environment, check=True, timeout=60
        )
        assert done.stdout == shown
        assert done.stderr == "error: something is wrong\n"
        assert log.read_text() == "line 1\nline 2\nline 3\nfrom a library\n"


def test_output_that_nobody_takes_ends_nothing_and_the_log_says_so_once(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ours, theirs = os.pipe()
    os.close(ours)
    with open("/dev/full", "w") as full, os.fdopen(theirs, "w") as unread:
        for number, (out, why) in enumerate(((full, "No space left"), (unread, "Broken pipe"))):
            log = tmp_path / str(number)
            done = subprocess.run(
                command(log, "echo"), stdout=out, stderr=out, env=environment, check=False, timeout=60
            )
            assert done.returncode == 0
            said = log.read_text()
            assert said.count("takes no more") == 1 and why in said
            assert [line for line in said.splitlines() if line.startswith("line")] == [
                "line 1",
                "line 2",
                "line 3",
            ]


def test_a_log_on_a_full_disk_ends_nothing_either() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for echo, shown in (("echo", "line 1\nline 2\nline 3\n"), ("no", "")):
        done = subprocess.run(
            command(Path("/dev/full"), echo), capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode in (0, 120)  # 120: Python itself cannot write what is left at its exit
        assert done.stdout == shown and "something is wrong" in done.stderr
