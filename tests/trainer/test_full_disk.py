"""A save that meets a full disk, for real: the run goes on, loudly, and the older checkpoint stays."""

import json
from pathlib import Path

from rank_processes import run_ranks
from small_stage import make_inputs, write_recipe

SCRIPT = Path(__file__).with_name("full_disk_ranks.py")


def test_training_goes_on_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    recipe = write_recipe(tmp_path, checkpoints__every_steps=2, checkpoints__keep_last=3)
    outputs = run_ranks(SCRIPT, 2, str(recipe))
    run = tmp_path / "run"
    assert "THE CHECKPOINT OF STEP 4 COULD NOT BE SAVED" in outputs[0]
    assert "File too large" in outputs[0]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event["step"]) for event in events if event["event"].startswith("save")]
    assert told == [("saved", 2), ("save_failed", 4), ("saved", 6)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-6"]
    assert (run / "export" / "export.json").exists()
