"""Every recipe in configs/ is complete: it loads with its model, and those of the paper have its numbers."""

import copy
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from data_pipeline.download.recipe import DownloadRecipe
from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.tokenize.recipe import TokenizeRecipe
from evaluation.recipes import CompareRecipe
from foundation.recipes import load_recipe
from models.backbone.presets import backbone_config
from trainer.recipe import StageRecipe
from trainer.tokenizer_training.recipe import TokenizerRecipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
STAGES = ("pt", "ct", "sft", "distill")
BACKBONES = {"14b": "configs/t2i", "1.7b": "configs/t2i/qwen3-1.7b", "0.6b": "configs/t2i/qwen3-0.6b"}

# Paper (arXiv 2602.14041), table 4.
TABLE = {
    "pt": {
        "lr": 1e-4,
        "warmup": 2000,
        "steps": 100_000,
        "batch": 2560,
        "ratio": {256: 2, 512: 7, 1024: 1},
        "p": 4,
    },
    "ct": {"lr": 1e-4, "warmup": 1000, "steps": 40_000, "batch": 2480, "ratio": {512: 1, 1024: 1}, "p": 4},
    "sft": {"lr": 2e-5, "warmup": 500, "steps": 40_000, "batch": 2320, "ratio": {512: 1, 1024: 1}, "p": 4},
    "distill": {"lr": 2e-5, "warmup": 500, "steps": 20_000, "batch": 1536, "ratio": {1024: 1}, "p": 8},
}
OF_JOB = {
    "download": DownloadRecipe,
    "filter": FilterRecipe,
    "tokenize": TokenizeRecipe,
    "tokenizer": TokenizerRecipe,
    "compare": CompareRecipe,
}


def stage(size: str, name: str) -> StageRecipe:
    return load_recipe(StageRecipe, ROOT / BACKBONES[size] / f"{name}.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_recipe_loads(path):
    # A job's recipe is named after it, or lies in a folder of such: configs/data/filters/sd2.yaml.
    job = path.stem if path.stem in OF_JOB else path.parent.name.removesuffix("s")
    model = StageRecipe if path.stem in (*STAGES, "finetune_1gpu") else OF_JOB[job]
    load_recipe(model, path)


@pytest.mark.parametrize("size", BACKBONES)
@pytest.mark.parametrize("name", STAGES)
def test_stages_have_the_numbers_of_the_paper(size, name):
    recipe, wanted = stage(size, name), TABLE[name]
    assert recipe.optimizer.lr == wanted["lr"] and recipe.optimizer.schedule == "constant"
    assert recipe.optimizer.warmup_steps == wanted["warmup"] and recipe.steps == wanted["steps"]
    assert recipe.data.global_batch_size == wanted["batch"] and recipe.model.p == wanted["p"]
    assert recipe.data.ratio == wanted["ratio"]
    assert recipe.optimizer.weight_decay == 0 and recipe.optimizer.clip == 1.0
    assert (*recipe.optimizer.betas, recipe.optimizer.eps) == (0.9, 0.95, 1e-15)
    assert recipe.data.text_drop == 0.1 and recipe.data.bit_flip == 0.1
    assert (recipe.loss.vision, recipe.loss.text) == (1.0, 0.01)


@pytest.mark.parametrize("size", BACKBONES)
def test_each_stage_starts_from_the_one_before(size):
    assert stage(size, "pt").model.pretrained == f"Qwen/Qwen3-{size.upper()}"
    assert stage(size, "pt").model.head.width == backbone_config(size).hidden_size
    for before, after in pairwise(STAGES):
        assert stage(size, after).model.init_from == f"{stage(size, before).run}/export"
    grown = [stage(size, name).model.grow_from for name in STAGES]
    assert grown == [None, None, None, 4]


def test_each_stage_of_the_quickstart_starts_from_the_one_before() -> None:
    stages = [load_recipe(StageRecipe, ROOT / "configs" / "quickstart" / f"{name}.yaml") for name in STAGES]
    for before, after in pairwise(stages):
        assert after.model.init_from == f"{before.run}/export"
    assert [(stage.model.p, stage.model.grow_from) for stage in stages] == [(4, None)] * 3 + [(8, 4)]


@pytest.mark.parametrize("size", ["1.7b", "0.6b"])
@pytest.mark.parametrize("name", STAGES)
def test_small_twins_differ_only_in_the_backbone(size, name):
    large = yaml.safe_load((ROOT / BACKBONES["14b"] / f"{name}.yaml").read_text())
    twin = copy.deepcopy(large)
    twin["run"] = large["run"].replace("/14b/", f"/{size}/")
    if name == "pt":
        twin["model"]["pretrained"] = f"Qwen/Qwen3-{size.upper()}"
        twin["model"]["head"]["width"] = backbone_config(size).hidden_size
    else:
        twin["model"]["init_from"] = large["model"]["init_from"].replace("/14b/", f"/{size}/")
    assert twin == yaml.safe_load((ROOT / BACKBONES[size] / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "hours"),
    [
        *((f"{folder}/{name}", "Hours") for folder in BACKBONES.values() for name in STAGES),
        ("configs/t2i/finetune_1gpu", "Hours"),
        *((f"configs/quickstart/{name}", "Seconds") for name in ("tokenizer", *STAGES)),
    ],
)
def test_the_top_of_a_recipe_that_trains_says_hours_hardware_and_metric(name, hours):
    top, _, _ = (ROOT / f"{name}.yaml").read_text().partition("\n\n")
    assert all(line.startswith("#") for line in top.splitlines())
    for word in ("Hardware", hours, "Metric", "Before", "Start"):
        assert f"\n# {word:10}" in top
    assert "?" not in top


def test_the_loss_that_pt_begins_with_is_as_its_recipe_says():
    """A new head predicts 0 for bits of ±1, so its loss is E[1/(1-t)²]; logit(t) is normal (-0.8, 0.8)."""
    head = stage("14b", "pt").model.head
    mean, variance = head.P_mean, head.P_std**2
    # 1/(1-t) = 1 + e^z, and E[e^(kz)] = exp(k mean + k² variance / 2). Times above 0.95 hardly occur.
    expected = 1 + 2 * math.exp(mean + variance / 2) + math.exp(2 * mean + 2 * variance)
    assert f"vision_loss starts at {expected:.2f}" in (ROOT / "configs/t2i/pt.yaml").read_text()


def test_dry_run_prints_a_stage_and_writes_nothing(tmp_path):
    command = [
        sys.executable,
        "-P",
        "-m",
        "bitdance",
        "train",
        str(ROOT / "configs/t2i/pt.yaml"),
        "--dry-run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "runs/t2i/14b/pt" in done.stdout and not list(tmp_path.iterdir())
