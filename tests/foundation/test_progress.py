"""Progress: what is done already counts, in plain lines as on a terminal's bar."""

import os
import pty
import subprocess
import sys

PROGRAM = """
from foundation import progress
progress.PLAIN_INTERVAL = 0.0
assert list(progress.track(range(41, 44), "Training", done=41)) == [41, 42, 43]
assert list(progress.track(iter("ab"), "Reading", total=2)) == ["a", "b"]
"""


def test_plain_lines_count_what_an_earlier_start_has_done():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    counts = [line.partition(",")[0] for line in done.stdout.splitlines()]
    assert counts == ["Training: 42/44", "Training: 43/44", "Training: 44/44", "Reading: 1/2", "Reading: 2/2"]


def test_the_bar_counts_what_an_earlier_start_has_done():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", PROGRAM], stdout=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "44/44" in shown and "/3" not in shown and "2/2" in shown
