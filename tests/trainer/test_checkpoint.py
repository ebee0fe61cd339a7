"""Saving and loading in one process: what is passed over, what a failed save leaves behind."""

import errno
import json
import os
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from foundation.errors import DataError, ExitCode, UserError
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import (
    MANIFEST,
    OtherRun,
    OtherVersion,
    StaleStart,
    committed,
    damaged,
    partial_folder,
)
from trainer.flat_shards import FlatShard, PlainUnpickler
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.run_folder import RunFolder, take_start

pytestmark = pytest.mark.usefixtures("process_group")


def checkpoints(run: RunFolder, keep_last: int = 2, lineage: dict[str, Any] | None = None) -> Checkpoints:
    start = take_start(run, 0, 1)
    events = EventLog(run, start, writes=True)
    section = CheckpointSection(keep_last=keep_last)
    return Checkpoints(run, start, section, "r" * 64, lineage or {"parent": None}, events)


def shards(value: float) -> dict[str, FlatShard]:
    return {
        "master/a": FlatShard(torch.full((7,), value), 0, 7),
        "exp_avg/a": FlatShard(torch.arange(7.0) * value, 0, 7),
    }


def save(to: Checkpoints, step: int) -> None:
    to.save(step, shards(float(step)), {"progress": step})
    to.wait()


def test_what_was_saved_comes_back_exactly(run: RunFolder) -> None:
    save(checkpoints(run), 3)
    into = shards(0.0)
    manifest = checkpoints(run).load_newest(into)
    assert manifest is not None and (manifest.step, manifest.state) == (3, {"progress": 3})
    for name, shard in shards(3.0).items():
        assert torch.equal(into[name].values, shard.values)


def test_a_save_is_of_the_moment_it_was_asked_for(run: RunFolder) -> None:
    saver, live = checkpoints(run), shards(1.0)
    saver.save(1, live, {})
    live["master/a"].values.fill_(99.0)  # training goes on while the writer writes
    saver.wait()
    into = shards(0.0)
    checkpoints(run).load_newest(into)
    assert torch.equal(into["master/a"].values, torch.ones(7))


def test_a_save_in_place_has_ended_when_training_goes_on(run: RunFolder) -> None:
    checkpoints(run).save(1, shards(1.0), {}, in_place=True)
    assert [step for step, _ in committed(run)] == [1]


def test_another_cut_reads_its_own_part(run: RunFolder) -> None:
    save(checkpoints(run), 2)
    into = {"exp_avg/a": FlatShard(torch.zeros(3), 2, 7)}
    checkpoints(run).load_newest(into)
    assert into["exp_avg/a"].values.tolist() == [4.0, 6.0, 8.0]


def test_a_damaged_checkpoint_is_passed_over_and_said(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = checkpoints(run)
    save(saver, 1)
    save(saver, 2)
    data = run.checkpoints / "step-2" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-3] + b"xyz")
    into = shards(0.0)
    manifest = checkpoints(run).load_newest(into)
    assert manifest is not None and manifest.step == 1
    assert torch.equal(into["master/a"].values, torch.ones(7))
    assert "step 2 is passed over: __0_0.distcp has changed" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(
    "where",
    [
        "trainer.checkpoint.read_manifest",
        "trainer.checkpoint_files.sha256_file",
        "trainer.checkpoint.committed",
        "torch.distributed.checkpoint.FileSystemReader.read_data",
    ],
)
def test_a_file_system_that_fails_is_no_proof_of_damage(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    saver = checkpoints(run)
    save(saver, 1)
    save(saver, 2)

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(where, failing)
        with pytest.raises(UserError, match="the same command goes on") as caught:
            checkpoints(run).load_newest(shards(0.0))
    assert [step for step, _ in committed(run)] == [2, 1] and not damaged(run)
    manifest = checkpoints(run).load_newest(shards(0.0))
    assert manifest is not None and manifest.step == 2
    assert caught.value.exit_code == (ExitCode.RECIPE if number == errno.EACCES else ExitCode.REQUEUE)


@pytest.mark.parametrize("change", [{"format": 2}, {"format": 2, "later": 1}, {"later": 1}])
def test_a_checkpoint_of_another_version_is_refused_and_stays(run: RunFolder, change: dict[str, int]) -> None:
    saver = checkpoints(run)
    save(saver, 1)
    save(saver, 2)
    file = run.checkpoints / "step-2" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for _ in range(2):
        with pytest.raises(OtherVersion, match=r"step-2/manifest\.json has .*another version") as caught:
            checkpoints(run).load_newest(shards(0.0))
        assert caught.value.exit_code == ExitCode.RECIPE
    assert [step for step, _ in committed(run)] == [2, 1] and not damaged(run)


def spoil(run: RunFolder, *steps: int) -> None:
    for step in steps:
        data = run.checkpoints / f"step-{step}" / "__0_0.distcp"
        data.write_bytes(data.read_bytes()[:-1])


def test_damaged_checkpoints_take_no_place_of_later_ones(run: RunFolder) -> None:
    saver = checkpoints(run, keep_last=3)
    for step in (100, 4000, 5000):
        save(saver, step)
    spoil(run, 4000, 5000)
    again = checkpoints(run, keep_last=2)
    manifest = again.load_newest(shards(0.0))
    assert manifest is not None and manifest.step == 100
    for step, kept in ((200, [200, 100]), (300, [300, 200]), (4000, [4000, 300])):
        save(again, step)
        assert [step for step, _ in committed(run)] == kept
    manifest = checkpoints(run).load_newest(shards(0.0))
    assert manifest is not None and manifest.step == 4000
    assert [path.name for path in damaged(run)] == ["step-4000.damaged-2", "step-5000.damaged-2"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(run: RunFolder) -> None:
    saver = checkpoints(run)
    save(saver, 1)
    save(saver, 2)
    spoil(run, 1, 2)
    for _ in range(2):
        with pytest.raises(DataError, match=r"is whole.*step-1\.damaged-2, \S*step-2\.damaged-2\. Put"):
            checkpoints(run).load_newest(shards(0.0))


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(run: RunFolder) -> None:
    save(checkpoints(run), 1)
    other = checkpoints(run, lineage={"parent": {"from": "elsewhere"}})
    with pytest.raises(OtherRun, match=r"lineage\.parent") as error:
        other.load_newest(shards(0.0))
    assert error.value.exit_code == ExitCode.RECIPE
    assert [step for step, _ in committed(run)] == [1]


def test_a_stale_start_does_not_go_back(run: RunFolder) -> None:
    """Its clearing up would remove what its replacement is writing."""
    stale = checkpoints(run)
    partial = partial_folder(run, 1, checkpoints(run).start)
    partial.mkdir()
    with pytest.raises(StaleStart):
        stale.load_newest(shards(0.0))
    assert partial.exists()


def test_no_space_left_is_loud_and_training_goes_on(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = checkpoints(run)
    save(saver, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", full)
        save(saver, 2)
    said = capsys.readouterr().out
    assert "STEP 2 COULD NOT BE SAVED" in said and "No space left" in said
    assert [step for step, _ in committed(run)] == [1]
    assert not list(run.checkpoints.glob("*.partial-*"))
    save(saver, 3)
    assert [step for step, _ in committed(run)] == [3, 1]


def test_a_folder_that_cannot_be_made_is_told_to_all_before_anything_is_written(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = checkpoints(run)
    run.checkpoints.rmdir()
    run.checkpoints.write_text("a file in the way")
    monkeypatch.setattr(dcp, "save", None)  # where the other ranks would wait for this one
    save(saver, 1)
    assert "STEP 1 COULD NOT BE SAVED" in capsys.readouterr().out


def test_a_start_that_was_replaced_is_not_told_to_make_room(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newer start has removed the folder that it was writing to."""
    stale = checkpoints(run)

    def replaced(*_: object) -> None:
        checkpoints(run)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", replaced)
    stale.save(1, shards(1.0), {})
    with pytest.raises(StaleStart):
        stale.wait()
    assert "COULD NOT BE SAVED" not in capsys.readouterr().out


def test_a_stale_start_learns_it_at_its_next_save(run: RunFolder) -> None:
    saver = checkpoints(run)
    newer = checkpoints(run)
    saver.save(1, shards(1.0), {})
    with pytest.raises(StaleStart):
        saver.wait()
    save(newer, 1)


def test_nothing_to_load_is_none(run: RunFolder) -> None:
    (run.checkpoints / "step-9").mkdir()  # without a manifest it is none
    assert checkpoints(run).load_newest(shards(0.0)) is None


def test_an_index_that_names_code_is_refused() -> None:
    import io

    class Attack:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    with pytest.raises(pickle.UnpicklingError, match=r"may not name builtins\.print"):
        PlainUnpickler(io.BytesIO(pickle.dumps(Attack()))).load()
