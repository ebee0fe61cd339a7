"""Fine-tuning with adapters, in real processes: train, resume, export, generate."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stage import make_inputs, write_recipe
from torch.distributed.checkpoint import FileSystemReader
from whole_runs import bitdance, computed, start, wait_until, weights

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents, and `base/export`: a model to fine-tune."""
    folder = tmp_path_factory.mktemp("finetuning")
    make_inputs(folder)
    done = bitdance("train", str(write_recipe(folder, "base.yaml", run=str(folder / "base"), steps=2)))
    assert done.returncode == 0, done.stdout
    return folder


def recipe(inputs: Path, name: str, **changes: object) -> Path:
    model = {"p": 4, "init_from": str(inputs / "base" / "export"), "lora": LORA}
    changes = {
        "run": str(inputs / name),
        "model": model,
        "checkpoints__every_steps": 2,
        "optimizer__lr": 0.01,
        **changes,
    }
    return write_recipe(inputs, f"{name}.yaml", **changes)


@pytest.fixture(scope="module")
def run(inputs: Path) -> Path:
    """bfloat16 under ZeRO-2 with the optimizer offloaded, as the recipe for one GPU has it."""
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    done = bitdance("train", str(recipe(inputs, "run", precision="bfloat16", zero=zero)))
    assert done.returncode == 0, done.stdout
    return inputs / "run"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_what_is_frozen_does_not_change_and_the_rest_does(inputs: Path, run: Path) -> None:
    before, after = stored(inputs / "base" / "export"), stored(run / "export")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        frozen = name.startswith("model.") and not any(target in name for target in LORA["targets"])
        if name.startswith(("encoder.", "decoder.")) or frozen or name == "lm_head.weight":
            assert torch.equal(after[name].float(), weight.to(after[name].dtype).float()), name
        elif weight.dim() == 2:
            assert not torch.equal(after[name].float(), weight.to(torch.bfloat16).float()), name


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(run: Path) -> None:
    (newest,) = (run / "checkpoints").glob("step-6")
    held = {name.split("/", 1)[1] for name in FileSystemReader(newest).read_metadata().state_dict_metadata}
    assert any("lora_A" in name for name in held) and any(name.startswith("vision_head") for name in held)
    assert not [name for name in held if name.startswith("llm.") and "lora_" not in name]


def test_the_export_samples(run: Path, tmp_path: Path) -> None:
    wish = ("--prompt", "a rocket", "--size", "128x128", "--steps", "2", "--output", str(tmp_path))
    done = bitdance("generate", str(run / "export"), *wish)
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.rglob("*.png"))


@pytest.mark.long
def test_killed_and_started_again_it_ends_in_the_same_bits(inputs: Path) -> None:
    """Two ranks under ZeRO-3, which shards the frozen weights too; what is dropped must be the same again."""
    two = {"world__processes": 2, "steps": 5}
    done = bitdance("train", str(recipe(inputs, "undisturbed", **two)))
    assert done.returncode == 0, done.stdout
    killed, path = inputs / "killed", recipe(inputs, "killed", **two)
    process = start("train", str(path))
    wait_until(lambda: (killed / "checkpoints" / "step-2").exists(), process)
    process.kill()
    process.communicate()
    done = bitdance("train", str(path))
    assert done.returncode == 0, done.stdout
    assert computed(killed) == computed(inputs / "undisturbed")
    assert weights(killed) == weights(inputs / "undisturbed")


def test_another_base_under_the_same_path_is_refused(inputs: Path, run: Path) -> None:
    file = inputs / "base" / "export" / "projector.safetensors"
    ours = json.loads((run / "lineage.json").read_text())["parent"]["files"][file.name]
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file)
    (run / "export").rename(run / "export-before")
    done: subprocess.CompletedProcess = bitdance("train", str(run / "recipe.yaml"))
    assert done.returncode == 65 and "Traceback" not in done.stdout
    assert (
        done.stdout.count(f"{file}: its hash is ") == 1 and f"the run began with {ours[:12]}" in done.stdout
    )
