"""Pictures beside a run: a process of its own makes them from checkpoints, and cannot harm the run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_stage import make_inputs, write_recipe
from whole_runs import bitdance, computed, events

from foundation.recipes import load_recipe
from models.weights import write_source
from trainer.recipe import StageRecipe
from trainer.sample_process import saved_model

SAMPLES = {
    "every_steps": 4,
    "prompts": ["a red house by the sea", "a rocket"],
    "size": [128, 128],
    "steps": 1,
    "guidance": 1.0,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    make_inputs(folder)
    return folder


def train(inputs: Path, name: str, **changes: object) -> Path:
    changes = {"run": str(inputs / name), "checkpoints__every_steps": 2, **changes}
    done = bitdance("train", str(write_recipe(inputs, f"{name}.yaml", **changes)))
    assert done.returncode == 0, done.stdout
    return inputs / name


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    return train(inputs, "run", samples=SAMPLES)


def test_pictures_of_a_step_appear_whole_and_nothing_else_stays(run: Path) -> None:
    (folder,) = (run / "samples").iterdir()
    # The first save from step 4 on, unless the run was faster than the first pictures.
    assert 4 <= int(folder.name.removeprefix("step-")) <= 6
    assert [path.suffix for path in sorted(folder.iterdir())] == [".png"] * 2
    assert [event["step"] for event in events(run, "sampled")] == [int(folder.name.removeprefix("step-"))]


@pytest.mark.long
def test_a_process_that_fails_is_told_and_changes_nothing(inputs: Path, run: Path) -> None:
    wrong = {**SAMPLES, "device": "cuda:7"}
    failed = train(inputs, "failed", samples=wrong)
    assert computed(failed) == computed(run)
    (event, *_) = events(failed, "sampling_failed")
    assert "ended with 78" in event["problem"]
    assert "sees no GPU here" in (failed / "logs" / "samples.log").read_text()
    assert not list((failed / "samples").iterdir())


@pytest.mark.parametrize(
    ("ema", "lora"),
    [
        pytest.param(None, None, id="plain"),
        pytest.param(0.9, {"rank": 2, "targets": ["q_proj"]}, id="ema, lora", marks=pytest.mark.long),
    ],
)
def test_what_is_sampled_is_what_would_be_exported(
    inputs: Path, run: Path, tmp_path: Path, lora: dict | None, ema: float | None
) -> None:
    model = {"p": 4, "init_from": str(run / "export"), "lora": lora}
    name = f"export-{bool(lora)}-{ema}"
    made = train(inputs, name, model=model, steps=2, optimizer__ema=ema, world__processes=2)
    source = saved_model(load_recipe(StageRecipe, made / "recipe.yaml"), made / "checkpoints" / "step-2")
    write_source(source, tmp_path / "copy")
    for path in (made / "export").glob("*.safetensors"):
        exported, copied = load_file(path), load_file(tmp_path / "copy" / path.name)
        assert exported.keys() == copied.keys()
        assert all(torch.equal(weight, copied[key]) for key, weight in exported.items())
