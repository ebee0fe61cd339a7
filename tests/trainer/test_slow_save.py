"""A save that lasts longer than the time to the next one: that one is postponed, training goes on."""

from pathlib import Path

from rank_processes import run_ranks
from small_stage import make_inputs, write_recipe

from trainer.metrics import read_lines

SCRIPT = Path(__file__).with_name("slow_save_ranks.py")


def test_the_next_save_is_postponed_on_all_ranks(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    recipe = write_recipe(tmp_path, steps=12, checkpoints__every_steps=2, checkpoints__keep_last=9)
    run_ranks(SCRIPT, 2, str(recipe))
    events = read_lines(tmp_path / "run" / "events.jsonl")
    saved = [event["step"] for event in events if event["event"] == "saved"]
    assert saved[0] == 2 and saved[-1] == 12
    assert saved[1] > 6  # steps 4 and 6 were due, and not waited for
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(12))
