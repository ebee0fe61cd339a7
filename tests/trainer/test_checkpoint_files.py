from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer import checkpoint_files
from trainer.checkpoint_files import (
    MANIFEST,
    CheckpointManifest,
    StaleStart,
    commit,
    committed,
    damage,
    damaged,
    describe_file,
    partial_folder,
    put_aside,
    read_manifest,
    remove_partials,
    retain,
    superseded,
)
from trainer.run_folder import RunFolder, take_start


def write(run: RunFolder, step: int, start: int) -> tuple[Path, CheckpointManifest]:
    partial = partial_folder(run, step, start)
    partial.mkdir()
    (partial / "state").write_bytes(bytes(range(100)))
    files = {"state": describe_file(partial / "state")}
    return partial, CheckpointManifest(step, start, "r" * 64, {}, {"progress": step}, files)


def save(run: RunFolder, step: int, start: int) -> Path:
    return commit(run, *write(run, step, start))


def test_a_checkpoint_appears_with_its_manifest(run: RunFolder) -> None:
    start = take_start(run, 0, 1)
    partial, manifest = write(run, 5, start)
    assert committed(run) == []
    final = commit(run, partial, manifest)
    assert committed(run) == [(5, final)]
    assert read_manifest(final) == manifest
    assert list(damage(final, manifest, manifest.files)) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "99 bytes, 100 were written"),
        (lambda path: path.write_bytes(bytes(100)), "hash"),
    ],
)
def test_damage_is_found(run: RunFolder, spoil: object, words: str) -> None:
    final = save(run, 5, take_start(run, 0, 1))
    spoil(final / "state")  # type: ignore[operator]
    (line,) = damage(final, read_manifest(final), ["state"])
    assert words in line


@pytest.mark.parametrize("text", ["", "{", "[1]", "1", '{"step": 1}'])
def test_a_broken_manifest_is_a_value_error(run: RunFolder, text: str) -> None:
    final = save(run, 5, take_start(run, 0, 1))
    (final / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="cannot be read"):
        read_manifest(final)


def test_a_missing_manifest_is_a_value_error_and_one_that_is_out_of_reach_is_none(run: RunFolder) -> None:
    final = save(run, 5, take_start(run, 0, 1))
    (final / MANIFEST).unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_manifest(final)
    (final / MANIFEST).mkdir()  # whoever runs this may be root, whom no rights keep out
    with pytest.raises(OSError, match=MANIFEST):
        read_manifest(final)


def test_a_stale_start_cannot_commit(run: RunFolder) -> None:
    old = take_start(run, 0, 1)
    partial, manifest = write(run, 5, old)
    new = take_start(run, 0, 1)
    with pytest.raises(StaleStart, match=f"Start {new}"):
        commit(run, partial, manifest)
    assert committed(run) == []
    save(run, 5, new)
    assert [step for step, _ in committed(run)] == [5]


def test_a_stale_start_that_has_passed_the_check_finds_its_folder_gone(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window between the look-up and the rename: there the new start's clearing up is the fence."""
    old = take_start(run, 0, 1)
    partial, manifest = write(run, 5, old)

    def overtaken(_: RunFolder) -> int:
        take_start(run, 0, 1)
        remove_partials(run)
        return old

    monkeypatch.setattr("trainer.checkpoint_files.latest_start", overtaken)
    with pytest.raises(StaleStart, match="removed"):
        commit(run, partial, manifest)
    assert committed(run) == []


def after_the_look_up(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """The start that next looks up the latest number is held up right after it, while ``happens``."""
    look_up = checkpoint_files.latest_start

    def held_up(run: RunFolder) -> int:
        monkeypatch.setattr(checkpoint_files, "latest_start", look_up)
        number = look_up(run)
        happens()
        return number

    monkeypatch.setattr(checkpoint_files, "latest_start", held_up)


def test_a_stale_start_leaves_what_its_replacement_has_committed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, manifest = write(run, 12, take_start(run, 0, 1))

    def replaced() -> None:
        new = take_start(run, 0, 1)
        remove_partials(run)
        save(run, 12, new)

    after_the_look_up(monkeypatch, replaced)
    with pytest.raises(StaleStart, match="removed"):
        commit(run, partial, manifest)
    ((step, folder),) = committed(run)
    assert (step, read_manifest(folder).start) == (12, 2)


def test_a_stale_start_puts_nothing_aside_that_its_replacement_has_saved(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = take_start(run, 0, 1)
    bad = save(run, 12, old)

    def replaced() -> None:
        new = take_start(run, 0, 1)
        put_aside(run, bad, new)
        save(run, 12, new)

    after_the_look_up(monkeypatch, replaced)
    with pytest.raises(StaleStart):
        put_aside(run, bad, old)
    ((_, folder),) = committed(run)
    assert read_manifest(folder).start == 2
    assert [path.name for path in damaged(run)] == ["step-12.damaged-2"]


def test_no_commit_takes_a_name_that_is_taken(run: RunFolder) -> None:
    start = take_start(run, 0, 1)
    save(run, 5, start)
    partial, manifest = write(run, 5, start)
    with pytest.raises(FileExistsError):
        commit(run, partial, manifest)
    assert partial.exists() and [step for step, _ in committed(run)] == [5]


def test_what_was_put_aside_counts_no_more_and_its_step_is_saved_again(run: RunFolder) -> None:
    start = take_start(run, 0, 1)
    for _ in range(2):
        put_aside(run, save(run, 5, start), start)
        assert committed(run) == []
    save(run, 5, start)
    retain(run, keep_last=1, keep_every=None)
    assert [step for step, _ in committed(run)] == [5]
    assert [path.name for path in damaged(run)] == ["step-5.damaged-1"]


def test_what_was_half_removed_is_cleared_up(run: RunFolder) -> None:
    start = take_start(run, 0, 1)
    (save(run, 5, start) / MANIFEST).unlink()
    remove_partials(run)
    save(run, 5, start)


def test_retention_keeps_the_newest_and_every_mth(run: RunFolder) -> None:
    start = take_start(run, 0, 1)
    for step in (10, 20, 30, 40, 50):
        save(run, step, start)
    retain(run, keep_last=2, keep_every=20)
    assert [step for step, _ in committed(run)] == [50, 40, 20]
    for step in (67, 83):
        save(run, step, start)
        retain(run, keep_last=1, keep_every=20)
    assert [step for step, _ in committed(run)] == [83, 67, 40, 20]
    retain(run, keep_last=1, keep_every=None)
    assert [step for step, _ in committed(run)] == [83]


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(1, 60), min_size=1, max_size=15),
    keep_last=st.integers(1, 4),
    keep_every=st.integers(1, 50),
)
@example(gaps=[3600, 3551, 3649, 3580, 3570, 3630], keep_last=3, keep_every=10000)
def test_of_saves_at_any_steps_the_first_at_or_after_each_multiple_stays_for_ever(
    gaps: list[int], keep_last: int, keep_every: int
) -> None:
    saved = list(accumulate(gaps))  # as saves by minutes come
    there: list[int] = []
    for number, step in enumerate(saved, 1):
        there.append(step)
        gone = superseded(there, keep_last, keep_every)
        there = [step for step in there if step not in gone]
        firsts = {
            min(later for later in saved if later >= multiple)
            for multiple in range(keep_every, step + 1, keep_every)
        }
        assert set(there) == firsts | set(saved[:number][-keep_last:])


def test_a_removal_cut_short_leaves_nothing_that_looks_whole(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = take_start(run, 0, 1)
    for step in (1, 2):
        save(run, step, start)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.checkpoint_files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        retain(run, keep_last=1, keep_every=None)
    assert [step for step, _ in committed(run)] == [2]
