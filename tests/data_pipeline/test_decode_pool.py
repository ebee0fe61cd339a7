"""Decode workers end with the process that they work for, however it ends."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.tokenize.decoding import ordered_map

JOB = """
import time
from multiprocessing.resource_tracker import _resource_tracker
from data_pipeline.tokenize.decoding import decode_pool
pool = decode_pool(2)
list(pool.map(time.sleep, [0.5] * 2))
print(*pool._processes, _resource_tracker._pid, flush=True)
pool.submit(time.sleep, 60)
time.sleep(60)
"""


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 12))
def test_no_more_is_held_than_the_window_and_one(weights, window):
    held = []

    def items():
        for place, weight in enumerate(weights):
            assert sum(held) < window
            held.append(weight)
            yield place, weight

    with ThreadPoolExecutor(1) as pool:
        results = []
        for item, result in ordered_map(pool, sum, items(), lambda item: item[1], window):
            results.append((item, result))
            held.remove(item[1])
    assert results == [(item, sum(item)) for item in enumerate(weights)] and not held


def test_nothing_is_left_behind_by_jobs_that_are_killed():
    jobs = {
        end: subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE, text=True)
        for end in (signal.SIGKILL, signal.SIGTERM)
    }
    workers = {end: [int(pid) for pid in job.stdout.readline().split()] for end, job in jobs.items()}
    every = [pid for pids in workers.values() for pid in pids]
    try:
        assert len(every) == 6 and all(map(lives, every))
        for end, job in jobs.items():
            job.send_signal(end)
            job.wait()
        stop = time.monotonic() + 20
        while any(map(lives, every)) and time.monotonic() < stop:
            time.sleep(0.02)
        assert {end: [pid for pid in pids if lives(pid)] for end, pids in workers.items()} == {
            signal.SIGKILL: [],
            signal.SIGTERM: [],
        }
    finally:
        for pid in filter(lives, every):
            os.kill(pid, signal.SIGKILL)
        for job in jobs.values():
            job.stdout.close()
