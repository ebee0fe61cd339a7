"""A picture is made again when its settings or its model have changed, and only then."""

import os
from pathlib import Path

import pytest
from PIL import Image

from evaluation.picture_files import picture_name, picture_settings, up_to_date, write_picture
from evaluation.recipes import Sampling

SETTINGS = picture_settings("a cat", (256, 256), Sampling(seed=3), 1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    os.utime(folder / "model.safetensors", (1_000_000, 1_000_000))
    return folder


def test_made_again_only_when_something_changed(tmp_path: Path, model: Path) -> None:
    path = tmp_path / picture_name("a cat", 3, 0)
    assert not up_to_date(path, SETTINGS, model)
    write_picture(path, Image.new("RGB", (8, 8)), SETTINGS)
    assert up_to_date(path, SETTINGS, model)
    assert not up_to_date(path, picture_settings("a cat", (256, 256), Sampling(seed=3, steps=7), 1), model)
    (model / "model.safetensors").write_bytes(b"newer weights")
    os.utime(model / "model.safetensors", (4e9, 4e9))
    assert not up_to_date(path, SETTINGS, model)


def test_a_broken_file_is_made_again(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "picture.png"
    write_picture(path, Image.new("RGB", (64, 64), "red"), SETTINGS)
    path.write_bytes(path.read_bytes()[:40])
    assert not up_to_date(path, SETTINGS, model)


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a" * 500, "猫", "", "What? A/B\\C"])
def test_names_are_safe_whatever_the_prompt(prompt: str) -> None:
    name = picture_name(prompt, 0, 1)
    assert Path(name).name == name and len(name) < 80 and name.endswith("-s0-1.png")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
