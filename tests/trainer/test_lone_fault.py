"""A fault that one rank alone meets, rank 0 too, is told by it and no other, and soon ends all."""

import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import free_port, rank_environment
from small_stage import write_recipe


def start_ranks(script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            env=rank_environment(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("faulty", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_other_ranks_end_with_it(tmp_path: Path, faulty: int) -> None:
    recipe = write_recipe(tmp_path)
    ranks = start_ranks("lone_fault_ranks.py", str(recipe), str(faulty))
    said = [rank.communicate(timeout=240)[0] for rank in ranks]  # a collective would wait for half an hour
    assert [rank.returncode for rank in ranks] == [65, 65], said
    logs = [(tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    everything = "\n".join(said + logs)
    assert "Traceback" not in everything and "onnection" not in everything, everything
    assert "00007.mds is damaged" in logs[faulty]
    assert "00007.mds" not in logs[1 - faulty] and "nother rank has met a fault" in logs[1 - faulty]
    assert sum(text.count("error: 00007.mds is damaged") for text in said) == 1


@pytest.mark.long
def test_a_rank_that_loses_the_first_before_it_has_decided_says_so(tmp_path: Path) -> None:
    ranks = start_ranks("lost_first_ranks.py", str(write_recipe(tmp_path)))
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-9, 75], said
    (line,) = said[1].splitlines()
    assert line.startswith("error: rank 1 has lost rank 0") and "The same command" in line
