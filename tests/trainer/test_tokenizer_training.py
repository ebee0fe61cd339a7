"""Training a tokenizer: it learns, goes on bit for bit when interrupted, refuses what it cannot use."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data_pipeline.recipe_folder import recipe_record
from foundation.errors import DataError, ExitCode, RecipeError
from foundation.ownership import FolderTaken
from foundation.recipes import load_recipe
from models.tokenizer import load_tokenizer
from trainer.tokenizer_training import train as training
from trainer.tokenizer_training.batches import batch_of_step
from trainer.tokenizer_training.finished import is_finished
from trainer.tokenizer_training.pictures import PictureGroup, load_pictures
from trainer.tokenizer_training.recipe import TokenizerRecipe

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).resolve().parents[2]


def write_shard(folder: Path, pictures: int = 6) -> Path:
    """A tar of pictures in one colour each (every third is wide), and one sample that is no picture."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index in range(pictures + 1):
            file = io.BytesIO()
            size = (64, 32) if index % 3 == 2 else (40, 40)
            Image.new("RGB", size, tuple(draw.integers(0, 256, 3).tolist())).save(file, "PNG")
            data = file.getvalue() if index < pictures else b"no picture"
            for name, content in ((f"{index:04}.png", data), (f"{index:04}.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def recipe_file(tmp_path: Path, **changes: object) -> Path:
    """A recipe of a second: tokens of 2x2 pixels, pictures of 16x16 and 16x32."""
    values = {
        "input": {"path": [str(tmp_path / "shards")]},
        "output": str(tmp_path / "out"),
        "classes": [{"resolution": 16, "buckets": [[16, 16], [16, 32]]}],
        "network": {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "bits": 8},
        "optimizer": {"lr": 3e-3, "warmup": 2, "ema": 0.5},
        "phases": [{"steps": 6, "resolutions": [16], "batch_pixels": 1024}],
        "precision": "float32",
        "checkpoint_every": 2,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def recipe_of(tmp_path: Path, **changes: object) -> TokenizerRecipe:
    return load_recipe(TokenizerRecipe, recipe_file(tmp_path, **changes))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_it_learns_and_leaves_a_whole_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], distance: str
) -> None:
    write_shard(tmp_path / "shards")
    phases = [{"steps": 40, "resolutions": [16], "batch_pixels": 1024}]
    losses = {"distance": distance}
    recipe = recipe_of(tmp_path, phases=phases, losses=losses, optimizer={"lr": 3e-3, "warmup": 5})
    assert training.train_tokenizer(recipe) == ExitCode.DONE
    out = tmp_path / "out"
    written = {
        "ae.safetensors",
        "ae_config.json",
        "metrics.jsonl",
        "provenance.json",
        "quality.json",
        "recipe.json",
    }
    assert set(files_of(out)) == written
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(40))
    first, last = (np.mean([line["reconstruction"] for line in part]) for part in (lines[:5], lines[-5:]))
    assert last < 0.5 * first
    quality = json.loads((out / "quality.json").read_text())
    assert [(row["size"], row["pictures"]) for row in quality] == [([16, 16], 4), ([16, 32], 2)]
    assert load_tokenizer(out).config.z_channels == 8
    assert "1 of 7 pictures cannot be used, the first: 0006" in capsys.readouterr().out

    before = files_of(out)
    assert training.train_tokenizer(recipe) == ExitCode.DONE
    assert "trained already" in capsys.readouterr().out
    assert files_of(out) == before


def test_another_recipe_is_refused_by_its_differing_keys(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards")
    recipe = recipe_of(tmp_path, phases=[{"steps": 1, "resolutions": [16], "batch_pixels": 256}])
    training.train_tokenizer(recipe)
    before = files_of(tmp_path / "out")
    other = load_recipe(TokenizerRecipe, tmp_path / "recipe.yaml", ["seed=3", "optimizer.lr=0.1"])
    with pytest.raises(RecipeError, match="another recipe") as caught:
        training.train_tokenizer(other)
    assert "seed: 0 -> 3" in str(caught.value) and "optimizer.lr: 0.003 -> 0.1" in str(caught.value)
    assert files_of(tmp_path / "out") == before


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal while it takes the pictures of `step`."""

    def with_signal(recipe: TokenizerRecipe, groups: list[PictureGroup], now: int) -> np.ndarray:
        if now == step:
            os.kill(os.getpid(), number)
        return batch_of_step(recipe, groups, now)

    monkeypatch.setattr(training, "batch_of_step", with_signal)


def test_interrupted_training_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "shards")
    training.train_tokenizer(recipe_of(tmp_path, output=str(tmp_path / "whole")))

    recipe = recipe_of(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    assert training.train_tokenizer(recipe) == ExitCode.REQUEUE
    interrupt_at(monkeypatch, 4, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.train_tokenizer(recipe)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "out" / "ae_config.json").exists()
    assert training.train_tokenizer(recipe) == ExitCode.DONE

    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "out")
    assert parts["ae.safetensors"] == whole["ae.safetensors"]
    assert parts["quality.json"] == whole["quality.json"]
    losses = [
        [json.loads(line)["loss"] for line in run["metrics.jsonl"].splitlines()] for run in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert "checkpoint.pt" not in parts


def test_a_kill_loses_only_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards")
    phases = [{"steps": 100_000, "resolutions": [16], "batch_pixels": 256}]
    path = recipe_file(tmp_path, phases=phases)
    program = "from trainer.tokenizer_training.cli import app; app()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, "train", str(path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = metrics.read_text().count("\n")
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"]
    assert done - 3 <= saved <= done + 1
    assert saved % 2 == 0


def test_other_pictures_are_refused_in_mid_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "shards")
    interrupt_at(monkeypatch, 1, signal.SIGTERM)
    recipe = recipe_of(tmp_path)
    training.train_tokenizer(recipe)
    (tmp_path / "shards" / "00000.tar").unlink()
    (tmp_path / "shards").rmdir()
    write_shard(tmp_path / "shards", pictures=5)
    with pytest.raises(DataError, match="other pictures"):
        training.train_tokenizer(recipe)
    write = tmp_path / "out" / "checkpoint.pt"
    write.write_bytes(write.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        training.train_tokenizer(recipe)


def test_what_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards", pictures=0)
    with pytest.raises(DataError, match="1 of 1 samples cannot be used"):
        training.train_tokenizer(recipe_of(tmp_path))
    with pytest.raises(DataError, match=r"no usable picture in .*\(1 refused\)"):
        training.train_tokenizer(recipe_of(tmp_path, max_bad_fraction=1.0))
    with pytest.raises(DataError, match="no pictures of kind 'webdataset' there"):
        training.train_tokenizer(recipe_of(tmp_path, input={"path": [str(tmp_path / "nowhere")]}))
    (tmp_path / "more").mkdir()
    write_shard(tmp_path / "more" / "shards")
    with pytest.raises(DataError, match="memory_gigabytes"):
        inputs = {"path": [str(tmp_path / "more" / "shards")]}
        training.train_tokenizer(recipe_of(tmp_path, input=inputs, memory_gigabytes=1e-6))
    assert not (tmp_path / "out").exists()


def test_all_mistakes_of_a_recipe_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(
            tmp_path,
            classes=[{"resolution": 16, "buckets": [[16, 17]]}],
            network={"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "bits": 12},
            phases=[{"steps": 1, "resolutions": [16, 99], "batch_pixels": 256}],
        )
    for part in ("16x17 is no multiple of 2", "group_bits = 8 does not divide network.bits = 12", "[99]"):
        assert part in str(caught.value)
    with pytest.raises(RecipeError, match="multiple of 32"):
        recipe_of(tmp_path, network={"ch": 48, "ch_mult": [1], "num_res_blocks": 1})


def test_batches_follow_from_the_step_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards")
    recipe = recipe_of(tmp_path)
    groups = load_pictures(recipe)
    sizes = set()
    for step in range(6):
        batch = batch_of_step(recipe, groups, step)
        assert np.array_equal(batch, batch_of_step(recipe, groups, step))
        # 1024 pixels are four pictures of 16x16, or two of 16x32.
        assert batch.shape in ((4, 16, 16, 3), (2, 16, 32, 3))
        assert len({picture.tobytes() for picture in batch}) == len(batch)
        sizes.add(batch.shape)
    assert len(sizes) == 2


def test_learning_rate_rises_then_falls_to_its_end(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, optimizer={"lr": 1.0, "final_lr": 0.2, "warmup": 2})
    rates = [training.learning_rate(recipe, step) for step in range(6)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)


def test_the_quickstart_recipe_loads() -> None:
    recipe = load_recipe(TokenizerRecipe, REPOSITORY / "configs/quickstart/tokenizer.yaml")
    assert (recipe.network.downsample, recipe.network.bits) == (16, 32)


def test_too_many_bad_pictures_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards", pictures=3)
    with pytest.raises(
        DataError, match=r"1 of 4 samples cannot be used, over max_bad_fraction = 0\.2"
    ) as error:
        training.train_tokenizer(recipe_of(tmp_path))
    assert "0003" in str(error.value) and not (tmp_path / "out").exists()
    recipe = recipe_of(tmp_path, max_bad_fraction=0.25)
    assert sum(len(group.pixels) for group in load_pictures(recipe)) == 3
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "recipe.json").write_text(recipe_record(recipe))
    assert not is_finished(recipe_of(tmp_path, max_bad_fraction=0.5)), "may be raised on the way"


def test_all_damaged_shards_are_told_together(tmp_path: Path) -> None:
    shards = write_shard(tmp_path / "shards")
    whole = (shards / "00000.tar").read_bytes()
    for name in ("00001.tar", "00002.tar"):
        (shards / name).write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"00001\.tar is no tar.*\n.*00002\.tar is no tar"):
        load_pictures(recipe_of(tmp_path))


def test_a_folder_of_something_else_is_the_recipe_s_mistake(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(FolderTaken, match=r"is not empty and holds no recipe\.json") as error:
        is_finished(recipe_of(tmp_path))
    assert error.value.exit_code == 78
