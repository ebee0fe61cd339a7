"""NaN gradients on one rank of two: steps are skipped; three in a row, and the run goes back and around."""

import json
from pathlib import Path

import pytest
from rank_processes import run_ranks
from small_stage import make_inputs, write_recipe

SCRIPT = Path(__file__).with_name("skip_ranks.py")
ALONE = [1, 3, 6, 8, 11, 13, 15]
IN_A_ROW = [18, 19, 20]
STEPS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping")
    make_inputs(folder)
    recipe = write_recipe(
        folder,
        steps=STEPS,
        data__global_batch_size=4,
        checkpoints__every_steps=17,
        guard={"rewind_after": 3},
    )
    run_ranks(SCRIPT, 2, str(recipe), *map(str, ALONE + IN_A_ROW))
    return folder / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_bad_step_is_skipped_and_named(run: Path) -> None:
    skips = [event for event in lines(run / "events.jsonl") if event["event"] == "skipped"]
    assert [skip["step"] for skip in skips] == ALONE + IN_A_ROW
    for skip in skips:
        assert "gradient norm is nan" in skip["reason"]
        assert len(skip["samples"]) == 4
        assert all(name.split("/")[0] in ("128", "256") for name in skip["samples"])


def test_three_in_a_row_go_back_and_are_passed_over(run: Path) -> None:
    (rewind,) = [event for event in lines(run / "events.jsonl") if event["event"] == "rewound"]
    assert rewind["passed_over"] == IN_A_ROW
    assert (rewind["step"], rewind["to_step"]) == (21, 17)


def test_the_others_are_trained_on_and_stay_finite(run: Path) -> None:
    metrics = lines(run / "metrics.jsonl")
    steps = [line["step"] for line in metrics]
    assert steps == [step for step in range(STEPS) if step not in IN_A_ROW]
    for line in metrics:
        skipped = line["step"] in ALONE
        assert ("skipped" in line) == skipped
        assert (line["grad_norm"] is None) == skipped
        assert line["loss"] is not None and line["loss"] < 10
    assert (run / "export" / "export.json").exists()


def test_what_was_skipped_is_part_of_the_checkpoint(run: Path) -> None:
    manifest = json.loads((run / "checkpoints" / f"step-{STEPS}" / "manifest.json").read_text())
    progress = manifest["state"]["progress"]
    assert progress["passed_over"] == IN_A_ROW
    assert [skip["step"] for skip in progress["skipped"]] == ALONE + IN_A_ROW
    assert manifest["state"]["optimizer_steps"] == STEPS - len(ALONE) - len(IN_A_ROW)
