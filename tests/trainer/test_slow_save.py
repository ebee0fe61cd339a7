"""A save that lasts longer than the time to the next one: that one is postponed, training goes on. And how
long ranks wait for one another meanwhile.
"""

import json
from pathlib import Path

from rank_processes import run_ranks
from small_stage import make_inputs, write_recipe

from trainer.metrics import read_lines

SCRIPT = Path(__file__).with_name("slow_save_ranks.py")


def test_the_next_save_is_postponed_on_all_ranks(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    recipe = write_recipe(tmp_path, steps=12, checkpoints__every_steps=2, checkpoints__keep_last=9)
    run_ranks(SCRIPT, 2, str(recipe))
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    # The world's group and DeepSpeed's clone of it, in which its collectives are, and the group of saves.
    assert "before the first step: [1800.0, 1860.0, 1860.0]" in log
    waits = [json.loads(line.split(": ", 1)[1]) for line in log.splitlines() if "in a save: [" in line]
    waits += [json.loads(line.split(": ", 1)[1]) for line in log.splitlines() if "after a step: [" in line]
    assert len(waits) > 12
    for saves, *training in waits:  # 20 steps of 100 s, and the watchdog comes first
        assert saves == 1800.0 and len(training) == 2 and min(training) >= 2060.0
    events = read_lines(tmp_path / "run" / "events.jsonl")
    saved = [event["step"] for event in events if event["event"] == "saved"]
    assert saved[0] == 2 and saved[-1] == 12
    assert saved[1] > 6  # steps 4 and 6 were due, and not waited for
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(12))
