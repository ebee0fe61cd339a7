"""Copies of checkpoints in an object store: a folder stands for it, or an address where nobody listens."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import torch
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.ingest.storage import StoreUnreachable
from foundation.errors import DataError, ExitCode
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import MANIFEST, OtherRun, committed
from trainer.flat_shards import FlatShard
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
from trainer.remote_copy import RemoteStore
from trainer.run_folder import RunFolder, take_start

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An s3:// address whose server's port is closed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("data_pipeline.ingest.storage.ATTEMPTS", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()


def new_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    run.starts.mkdir()
    return run


def checkpoints(
    run: RunFolder, remote: str, keep_last: int = 1, recipe: str = "r" * 64, keep_every: int | None = None
) -> Checkpoints:
    start = take_start(run, 0, 1)
    events = EventLog(run, start, writes=True)
    section = CheckpointSection(remote=remote, keep_last=keep_last, keep_every=keep_every)
    return Checkpoints(run, start, section, recipe, {"parent": None}, events)


def copies(remote: Path, run: str = "run") -> list[str]:
    return sorted(path.name for path in (remote / run).iterdir())


def spoil(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])


def shards(value: float) -> dict[str, FlatShard]:
    return {"master/a": FlatShard(torch.full((7,), value), 0, 7)}


def save(to: Checkpoints, *steps: int) -> None:
    for step in steps:
        to.save(step, shards(float(step)), {})
        to.wait()


def test_an_empty_run_is_filled(tmp_path: Path, remote: Path) -> None:
    saver = checkpoints(new_run(tmp_path / "run"), f"file://{remote}")
    save(saver, 1, 2)
    saver.close()
    assert copies(remote) == ["step-2"]
    lost = new_run(tmp_path / "another disk" / "run")
    (lost.checkpoints / "step-2").mkdir()  # a removal that was cut short: no manifest, so it is none
    (lost.checkpoints / "step-2" / "__0_0.distcp").write_bytes(b"remains")
    into = shards(0.0)
    assert checkpoints(lost, f"file://{remote}").load_newest(into) is not None
    assert json.loads((lost.checkpoints / "step-2" / MANIFEST).read_text())["step"] == 2
    assert torch.equal(into["master/a"].values, torch.full((7,), 2.0))


def test_a_run_with_checkpoints_resumes_from_its_own(tmp_path: Path, remote: Path) -> None:
    run = new_run(tmp_path / "run")
    saver = checkpoints(run, f"file://{remote}")
    save(saver, 1)
    saver.close()
    into = shards(0.0)
    again = checkpoints(run, f"file://{remote}").load_newest(into)
    assert again is not None and again.step == 1
    assert not list(run.checkpoints.glob("*.partial-*"))


def test_training_goes_on_without_the_store(
    tmp_path: Path, nobody_listens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path / "run")
    saver = checkpoints(run, nobody_listens)
    save(saver, 1)
    saver.close()
    save_after = checkpoints(run, nobody_listens)
    save(save_after, 2)
    save_after.close()
    said = capsys.readouterr().out
    for step in (1, 2):
        assert f"THE COPY OF step-{step} TO s3://bucket/run FAILED (s3://bucket/run cannot be reached" in said
    assert "COULD NOT BE SAVED" not in said
    assert [step for step, _ in committed(run)] == [2]
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [event["event"] for event in events] == ["saved", "copy_failed"] * 2


def test_a_fetch_without_the_store_is_said_in_words(tmp_path: Path, nobody_listens: str) -> None:
    empty = checkpoints(new_run(tmp_path / "run"), nobody_listens)
    with pytest.raises(StoreUnreachable, match="s3://bucket/run cannot be reached") as error:
        empty.load_newest(shards(0.0))
    assert error.value.exit_code == ExitCode.REQUEUE


def test_saves_do_not_wait_for_a_slow_store(
    tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, line_is_up, uploaded = new_run(tmp_path / "run"), threading.Event(), []
    upload = RemoteStore.upload

    def slowly(store: RemoteStore, folder: Path) -> None:
        assert line_is_up.wait(60)
        upload(store, folder)
        uploaded.append(folder.name)

    monkeypatch.setattr(RemoteStore, "upload", slowly)
    saver = checkpoints(run, f"file://{remote}")
    save(saver, 1, 2, 3, 4)  # would wait for ever, were the copy of the first one part of any of them
    # What is being copied stays although keep_last is 1; of the others only the newest is to be copied.
    assert [step for step, _ in committed(run)] == [4, 1]
    line_is_up.set()
    saver.close()
    assert uploaded == ["step-1", "step-4"]
    assert copies(remote) == ["step-4"]


def save_and_copy(to: Checkpoints, *steps: int) -> None:
    """Each is copied before the next one is saved, so none is left out."""
    for step in steps:
        save(to, step)
        while to._copies.under_way():
            time.sleep(0.01)


def lost(run: RunFolder) -> RunFolder:
    """The run folder again, without anything in it."""
    shutil.rmtree(run.path)
    return new_run(run.path)


def test_of_damaged_copies_the_next_older_is_taken(
    tmp_path: Path, remote: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = new_run(tmp_path / "run"), f"file://{remote}"
    saver = checkpoints(run, store, keep_last=2)
    save_and_copy(saver, 4000, 5000)
    saver.close()
    spoil(remote / "run" / "step-5000")
    run, into = lost(run), shards(0.0)
    again = checkpoints(run, store, keep_last=2)
    manifest = again.load_newest(into)
    assert manifest is not None and manifest.step == 4000
    assert torch.equal(into["master/a"].values, torch.full((7,), 4000.0))
    assert "step 5000 is passed over: __0_0.distcp has" in capsys.readouterr().out
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-4000"]
    # The damaged copy is later than what is saved from now on, and must not take its place.
    save_and_copy(again, 4100)
    assert copies(remote) == ["step-4000", "step-4100", "step-5000"]
    save_and_copy(again, 4200, 5000)
    again.close()
    assert copies(remote) == ["step-4200", "step-5000"]
    manifest = checkpoints(lost(run), store).load_newest(into)
    assert manifest is not None and manifest.step == 5000


def test_copies_are_kept_as_the_checkpoints_are(tmp_path: Path, remote: Path) -> None:
    run = new_run(tmp_path / "run")
    saver = checkpoints(run, f"file://{remote}", keep_every=10)
    save_and_copy(saver, 7, 12, 15, 31, 33)
    saver.close()
    assert copies(remote) == ["step-12", "step-31", "step-33"]
    assert [step for step, _ in committed(run)] == [33, 31, 12]


def test_uploads_cut_short_are_cleared_up_by_the_next(tmp_path: Path, remote: Path) -> None:
    run = new_run(tmp_path / "run")
    for name in ("step-3", "step-5", "step-9"):
        (remote / "run" / name).mkdir(parents=True)
        (remote / "run" / name / "__7_0.distcp").write_bytes(b"of eight ranks")
    (remote / "run" / "step-77").mkdir()
    (remote / "run" / "step-77" / "mine.txt").write_text("no checkpoint's")
    (remote / "run" / "step-3.mine").mkdir()
    (remote / "run" / "step-3.mine" / MANIFEST).write_text("{}")
    saver = checkpoints(run, f"file://{remote}", keep_last=2)
    save_and_copy(saver, 4, 5)
    saver.close()
    assert copies(remote) == ["step-3.mine", "step-4", "step-5", "step-77"]
    assert (remote / "run" / "step-77" / "mine.txt").exists()
    here = {path.name: path.read_bytes() for path in (run.checkpoints / "step-5").iterdir()}
    assert {path.name: path.read_bytes() for path in (remote / "run" / "step-5").iterdir()} == here


def test_an_upload_that_was_cleared_up_meanwhile_gets_no_manifest(
    tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = LocalFileSystem.put_file

    def slowly(store: LocalFileSystem, here: str, there: str) -> None:
        put(store, here, there)
        if here.endswith("/.metadata"):  # the first file
            Path(there).unlink()  # by a start that has replaced this one

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", slowly)
        saver = checkpoints(new_run(tmp_path / "run"), f"file://{remote}")
        save_and_copy(saver, 4)
    assert "THE COPY OF step-4 TO" in capsys.readouterr().out
    assert saver._copies.store.steps() == []
    save_and_copy(saver, 5)
    saver.close()
    assert copies(remote) == ["step-5"]


def test_a_run_whose_copies_are_all_damaged_does_not_begin_again(tmp_path: Path, remote: Path) -> None:
    run, store = new_run(tmp_path / "run"), f"file://{remote}"
    saver = checkpoints(run, store)
    save_and_copy(saver, 3)
    saver.close()
    spoil(remote / "run" / "step-3")
    spoil(run.checkpoints / "step-3")
    for start in range(4):  # the second finds what the first has left; to the third the disk is new
        run = lost(run) if start == 2 else run
        with pytest.raises(DataError, match=rf"is whole.*Damaged: .*{store}/run/step-3\. Put"):
            checkpoints(run, store).load_newest(shards(0.0))
    assert copies(remote) == ["step-3"]


def test_another_runs_copies_are_neither_taken_nor_touched(
    tmp_path: Path, remote: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = new_run(tmp_path / "run"), f"file://{remote}"
    saver = checkpoints(run, store)
    save_and_copy(saver, 9000)
    saver.close()
    run = lost(run)
    other = checkpoints(run, store, recipe="s" * 64)
    with pytest.raises(OtherRun, match=f"{store}/run/step-9000 is .*another run") as error:
        other.load_newest(shards(0.0))
    assert 'recipe_sha256: "rrrr' in str(error.value) and error.value.exit_code == ExitCode.RECIPE
    assert list(run.checkpoints.iterdir()) == []
    save_and_copy(other, 10)
    other.close()
    assert "THE COPY OF step-10 TO" in capsys.readouterr().out
    assert copies(remote) == ["step-9000"] and [step for step, _ in committed(run)] == [10]


def test_a_fork_has_copies_of_its_own(tmp_path: Path, remote: Path) -> None:
    store = f"file://{remote}"
    for name, recipe, step in (("run", "r" * 64, 9000), ("run-2", "s" * 64, 10)):
        saver = checkpoints(new_run(tmp_path / name), store, recipe=recipe)
        assert saver.load_newest(shards(0.0)) is None
        save_and_copy(saver, step)
        saver.close()
    assert (copies(remote), copies(remote, "run-2")) == (["step-9000"], ["step-10"])
