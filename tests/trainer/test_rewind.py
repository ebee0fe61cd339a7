"""A run goes back to its newest checkpoint while a save is being written: neither is lost, no rank hangs."""

from pathlib import Path

from rank_processes import run_ranks

from trainer.checkpoint_files import committed
from trainer.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("rewind_ranks.py")


def test_a_save_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    outputs = run_ranks(SCRIPT, 2, str(tmp_path / "run"))
    for output in outputs:
        assert "back to 2: [2.0, 2.0, 2.0, 2.0]" in output
        assert "COULD NOT BE SAVED" not in output
        assert "ends with 75: " in output and "Stale file handle; the same command goes on" in output
    assert [step for step, _ in committed(RunFolder(tmp_path / "run"))] == [3, 2]
