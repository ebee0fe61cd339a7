"""A picture is made again when its settings or its model have changed, and only then."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.picture_files import picture_name, picture_settings, source_of, up_to_date, write_picture
from evaluation.recipes import Sampling

SIZE, SAMPLING = (256, 256), Sampling(seed=3)


def weights(folder: Path, content: bytes = b"weights") -> Path:
    """A folder whose files are older than any picture."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    os.utime(folder / "model.safetensors", (1_000_000, 1_000_000))
    return folder


def settings(
    model: Path,
    sampling: Sampling = SAMPLING,
    tokenizer: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    return picture_settings("a cat", SIZE, sampling, 1, source_of(model, tokenizer, device, dtype))


def test_made_again_only_when_something_changed(tmp_path: Path) -> None:
    model, path = weights(tmp_path / "model"), tmp_path / picture_name("a cat", 3, 0)
    assert not up_to_date(path, settings(model))
    write_picture(path, Image.new("RGB", (8, 8)), settings(model))
    assert up_to_date(path, settings(model))
    assert not up_to_date(path, settings(model, Sampling(seed=3, steps=7)))
    assert not up_to_date(path, settings(model, tokenizer=weights(tmp_path / "ae")))
    assert not up_to_date(path, settings(model, dtype="bfloat16"))
    assert not up_to_date(path, settings(model, device="cuda"))
    assert not up_to_date(path, settings(weights(tmp_path / "older model", b"others")))
    weights(model, b"newer weights")
    assert not up_to_date(path, settings(model))


def test_a_broken_file_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    made_with = settings(weights(tmp_path / "model"))
    write_picture(path, Image.new("RGB", (64, 64), "red"), made_with)
    path.write_bytes(path.read_bytes()[:40])
    assert not up_to_date(path, made_with)


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a" * 500, "猫", "", "What? A/B\\C"])
def test_names_are_safe_whatever_the_prompt(prompt: str) -> None:
    name = picture_name(prompt, 0, 1)
    assert Path(name).name == name and len(name) < 80 and name.endswith("-s0-1.png")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
