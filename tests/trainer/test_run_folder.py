import json
import os
from pathlib import Path

import pytest
from small_stage import write_recipe
from typer.testing import CliRunner

from foundation.errors import DataError, ExitCode, RecipeError
from foundation.ownership import FolderTaken
from foundation.recipes import load_recipe
from trainer.cli import app
from trainer.lineage import lineage_lines
from trainer.recipe import StageRecipe
from trainer.run_folder import (
    EXPORT_MANIFEST,
    NoProgress,
    RunFolder,
    RunInUse,
    claimed,
    create_run,
    find_run,
    first_started,
    latest_start,
    lock_run,
    makes_no_progress,
    note_refusal,
    take_start,
)


def begin(recipe: StageRecipe) -> RunFolder:
    run = create_run(recipe)
    run.lineage.write_text("{}")
    return run


def recipe(folder: Path, **changes: object) -> StageRecipe:
    return load_recipe(StageRecipe, write_recipe(folder, **changes))


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    begin(recipe(tmp_path))
    with pytest.raises(RecipeError) as error:
        find_run(recipe(tmp_path, optimizer__lr=5e-4, steps=9))
    assert "optimizer.lr: 0.001 -> 0.0005" in str(error.value)
    assert "steps: 6 -> 9" in str(error.value)
    assert "--fork" in str(error.value)


def test_where_and_how_fast_may_change(tmp_path: Path) -> None:
    begin(recipe(tmp_path))
    changed = recipe(tmp_path, world__processes=4, zero__stage=1, checkpoints__every_steps=3)
    assert find_run(changed).run == str(tmp_path / "run")


def test_fork_takes_the_next_free_folder_and_comes_back_to_it(tmp_path: Path) -> None:
    begin(recipe(tmp_path))
    other = recipe(tmp_path, steps=9)
    forked = find_run(other, fork=True)
    assert forked.run == str(tmp_path / "run-2")
    begin(forked)
    assert find_run(other, fork=True).run == forked.run
    assert find_run(recipe(tmp_path, steps=10), fork=True).run == str(tmp_path / "run-3")


def test_a_start_that_was_refused_does_not_bind(tmp_path: Path) -> None:
    run = create_run(recipe(tmp_path))
    assert find_run(recipe(tmp_path, steps=9)).steps == 9
    note_refusal(run, take_start(run, 0, ranks=1), ExitCode.DATA)
    assert find_run(recipe(tmp_path, steps=9)).steps == 9
    take_start(run, 0, ranks=1)  # under srun it holds no lock
    with pytest.raises(FolderTaken, match="steps: 6 -> 9"):
        find_run(recipe(tmp_path, steps=9))


def test_a_second_start_leaves_the_recipe_of_one_that_is_starting(tmp_path: Path) -> None:
    ours, other = recipe(tmp_path), recipe(tmp_path, optimizer__lr=0.5)
    with claimed(ours) as run:
        written = run.recipe.read_text()
        with pytest.raises(FolderTaken, match=r"optimizer\.lr: 0\.001 -> 0\.5"):
            find_run(other)
        assert find_run(other, fork=True).run == str(tmp_path / "run-2")
        for second in (ours, other):  # the other had looked before ours was written
            with pytest.raises(RunInUse, match=f"by process {os.getpid()} already"), claimed(second):
                pass
        assert run.recipe.read_text() == written
    assert find_run(other).run == ours.run  # nothing had come of it
    run.lineage.write_text("{}")
    with pytest.raises(FolderTaken), claimed(other):  # meanwhile it is another's
        pass
    assert run.recipe.read_text() == written


def test_under_srun_the_folder_is_held_only_until_the_recipe_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with claimed(recipe(tmp_path)):
        monkeypatch.setenv("SLURM_PROCID", "0")
        with pytest.raises(RunInUse), claimed(recipe(tmp_path)):
            pass
    with claimed(recipe(tmp_path)), claimed(recipe(tmp_path)) as run:
        assert run.recipe.exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(FolderTaken, match="not a run folder"):
        find_run(recipe(tmp_path))


@pytest.mark.parametrize("left", ["logs/rank-1.log", "slurm/12.log", ".recipe.yaml.node.7.0123abcd.partial"])
def test_what_a_start_leaves_that_is_killed_at_once_is_no_run_folder(tmp_path: Path, left: str) -> None:
    file = tmp_path / "run" / left
    file.parent.mkdir(parents=True)
    file.touch()
    assert find_run(recipe(tmp_path)).run == str(tmp_path / "run")
    create_run(recipe(tmp_path))
    assert file.exists()


def test_the_recipe_is_the_first_that_a_run_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(values: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.run_folder.resolved_yaml", killed)
    with pytest.raises(KeyboardInterrupt):
        create_run(recipe(tmp_path))
    assert find_run(recipe(tmp_path)).run == str(tmp_path / "run")


def test_finished_is_told_by_the_export(tmp_path: Path) -> None:
    run = create_run(recipe(tmp_path))
    assert run.finished_at() is None
    run.export.mkdir()
    (run.export / EXPORT_MANIFEST).write_text(json.dumps({"step": 6}))
    assert run.finished_at() == 6


def test_starts_are_numbered_and_stop_without_progress(tmp_path: Path) -> None:
    run = create_run(recipe(tmp_path))
    assert [take_start(run, step, 2) for step in (0, 0, 10, 10, 10)] == [1, 2, 3, 4, 5]
    with pytest.raises(NoProgress, match="never got past step 10"):
        take_start(run, 10, 2)
    assert latest_start(run) == 5
    assert take_start(run, 10, 2, despite_no_progress=True) == 6
    assert take_start(run, 11, 2) == 7


def test_refused_starts_lock_nobody_out_and_keep_their_numbers(tmp_path: Path) -> None:
    run = create_run(recipe(tmp_path))
    for number in (1, 2, 3):
        assert take_start(run, 0, 1) == number
        note_refusal(run, number, ExitCode.DATA)
    assert [take_start(run, 0, 1) for _ in range(3)] == [4, 5, 6]
    assert makes_no_progress(run, 0) and latest_start(run) == 6
    with pytest.raises(NoProgress):
        take_start(run, 0, 1)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = create_run(recipe(tmp_path))
    held = lock_run(run)
    with pytest.raises(RunInUse, match="being trained by process"):
        lock_run(RunFolder(run.path))
    held.close()
    lock_run(run).close()


def test_dry_run_prints_the_recipe_before_it_refuses_the_run_folder(tmp_path):
    path = write_recipe(tmp_path)
    create_run(load_recipe(StageRecipe, path)).lineage.write_text("{}")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    other = ["train", str(path), "--dry-run", "--set", "optimizer.lr=0.5"]
    done = CliRunner().invoke(app, other)
    assert isinstance(done.exception, FolderTaken) and done.exception.exit_code == 78
    assert "lr: 0.5" in done.stdout and "optimizer.lr: 0.001 -> 0.5" in str(done.exception)
    forked = CliRunner().invoke(app, [*other, "--fork"])
    assert forked.exit_code == 0 and f"run: {tmp_path}/run-2" in forked.stdout
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("content", [b"steps: [", b"- 1", b"", b"steps: \xff"])
def test_a_damaged_recipe_of_a_run_is_named(tmp_path: Path, content: bytes) -> None:
    run = begin(recipe(tmp_path))
    run.recipe.write_bytes(content)
    with pytest.raises(DataError, match=r"run/recipe\.yaml is damaged .*: put there what .*--dry-run"):
        find_run(recipe(tmp_path))


def test_damaged_notes_of_a_run_are_named_and_an_empty_start_is_none(tmp_path: Path) -> None:
    run = begin(recipe(tmp_path))
    take_start(run, 0, ranks=2)
    (run.starts / "0002.json").touch()  # killed while it was written
    assert first_started(run) > 0 and latest_start(run) == 2
    (run.starts / "0001.json").write_text('{"time": ')
    with pytest.raises(DataError, match=r"starts/0001\.json is damaged .*: empty it"):
        first_started(run)
    run.export.mkdir()
    (run.export / EXPORT_MANIFEST).write_text("{}")
    with pytest.raises(DataError, match=r"export\.json is damaged \(without step\): remove the folder"):
        run.finished_at()


@pytest.mark.parametrize("name", ["lineage.json", EXPORT_MANIFEST])
@pytest.mark.parametrize(
    "lineage", [{}, {"parent": None, "dataset": {}}, {"parent": 3, "dataset": {}, "recipe_sha256": 1}]
)
def test_a_damaged_lineage_is_named(tmp_path: Path, name: str, lineage: dict) -> None:
    values = lineage if name == "lineage.json" else {"lineage": lineage}
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"{name} is damaged .*: put back a copy"):
        lineage_lines(tmp_path)
