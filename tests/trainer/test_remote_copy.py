"""Copies of checkpoints in an object store: a folder stands for it, or an address where nobody listens."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import torch

from data_pipeline.ingest.storage import StoreUnreachable
from foundation.errors import ExitCode
from trainer import remote_copy
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import MANIFEST, committed
from trainer.flat_shards import FlatShard
from trainer.metrics import EventLog
from trainer.recipe import CheckpointSection
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
    yield "s3://bucket/run"
    s3fs.S3FileSystem.clear_instance_cache()


def new_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    run.starts.mkdir()
    return run


def checkpoints(run: RunFolder, remote: str, **section: object) -> Checkpoints:
    start = take_start(run, 0, 1)
    events = EventLog(run, start, writes=True)
    section = {"remote": remote, "keep_last": 1, **section}
    return Checkpoints(run, start, CheckpointSection(**section), "r" * 64, {"parent": None}, events)


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
    assert [path.name for path in remote.iterdir()] == ["step-2"]
    lost = new_run(tmp_path / "lost")
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
    upload = remote_copy.upload

    def slowly(folder: Path, section: CheckpointSection) -> None:
        assert line_is_up.wait(60)
        upload(folder, section)
        uploaded.append(folder.name)

    monkeypatch.setattr(remote_copy, "upload", slowly)
    saver = checkpoints(run, f"file://{remote}")
    save(saver, 1, 2, 3, 4)  # would wait for ever, were the copy of the first one part of any of them
    # What is being copied stays although keep_last is 1; of the others only the newest is to be copied.
    assert [step for step, _ in committed(run)] == [4, 1]
    line_is_up.set()
    saver.close()
    assert uploaded == ["step-1", "step-4"]
    assert [path.name for path in remote.iterdir()] == ["step-4"]
