"""A save that meets a full disk, for real: the run goes on, loudly, and the older checkpoint stays."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import run_ranks
from small_stage import make_inputs, write_recipe

from data_pipeline.store import PlaceUnusable, writing_to

SCRIPT = Path(__file__).with_name("full_disk_ranks.py")
ROOT = Path(__file__).parents[2]


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


@pytest.mark.long
def test_a_disk_that_is_full_at_the_end_is_said_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    """A real small file system, with room for two checkpoints and no export."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    make_inputs(tmp_path)
    checkpoints = {"every_minutes": None, "every_steps": 2, "keep_last": 2}
    recipe = write_recipe(tmp_path, run=str(disk / "run"), checkpoints=checkpoints)
    command = [sys.executable, "-m", "bitdance", "train", str(recipe)]
    try:
        full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert full.returncode == 78 and "Traceback" not in full.stdout + full.stderr
        assert full.stdout.count("THE CHECKPOINT OF STEP 6 COULD NOT BE SAVED") == 1
        assert full.stderr.count("No space left on device; what is done stays done") == 1
        assert sorted(path.name for path in (disk / "run/checkpoints").iterdir()) == ["step-2", "step-4"]
        assert not (disk / "run/export").exists()
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and (disk / "run/export/export.json").exists()
        assert not list((disk / "run").glob("export.partial*"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_copy_that_finds_no_room_is_told_by_where_it_was_to_go() -> None:
    """As `shutil.copyfile` raises it, whose source may lie on another disk."""
    with pytest.raises(PlaceUnusable, match=r"^export/copy: No space left on device"), writing_to("a place"):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere/source", None, "export/copy")
