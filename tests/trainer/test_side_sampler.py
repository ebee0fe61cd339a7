"""The side sampler meets a file system that fails: it is told, and nothing is raised."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics import EventLog
from trainer.recipe import SamplesSection
from trainer.run_folder import RunFolder
from trainer.samples import SideSampler, partial_pictures


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "logs").mkdir()
    return RunFolder(tmp_path)


def side_sampler(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> SideSampler:
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: start(["true"]))
    section = SamplesSection(every_steps=2, prompts=["a red house"], size=(128, 128))
    return SideSampler(run, section, EventLog(run, 1, writes=True))


def told(run: RunFolder) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in run.events.read_text().splitlines()]
    return [(line["event"], line["step"]) for line in lines]


def test_pictures_that_cannot_be_put_in_their_place(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = side_sampler(run, monkeypatch)
    partial = partial_pictures(run, 2)
    partial.mkdir(parents=True)
    (run.samples / "step-2" / "0.png").mkdir(parents=True)  # something else stands there
    sampler.finish(2)
    assert told(run) == [("sampling_failed", 2)] and not partial.exists()
    partial_pictures(run, 4).mkdir()
    sampler.finish(4)
    assert told(run)[1:] == [("sampled", 4)] and (run.samples / "step-4").is_dir()


def test_a_folder_for_them_that_cannot_be_made(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.samples.touch()
    side_sampler(run, monkeypatch).finish(2)
    assert told(run) == [("sampling_failed", 2)]


def test_what_an_earlier_start_has_left_and_cannot_be_removed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial_pictures(run, 2).mkdir(parents=True)
    removed = shutil.rmtree

    def failing(path: Path, ignore_errors: bool = False, **options: Any) -> None:
        if not ignore_errors:
            raise OSError("stale file handle")
        removed(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", failing)
    side_sampler(run, monkeypatch)
