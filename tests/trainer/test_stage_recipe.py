import math
from pathlib import Path

import pytest
from small_stage import recipe_values, write_recipe

from foundation.errors import RecipeError
from foundation.recipes import load_recipe, resolved_yaml
from trainer.recipe import StageRecipe

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "t2i").rglob("*.yaml")) + [
    ROOT / "configs" / "quickstart" / f"{stage}.yaml" for stage in ("pt", "ct", "sft", "distill")
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "-".join(path.relative_to(ROOT / "configs").parts))
def test_every_recipe_of_ours_loads_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(StageRecipe, path)
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(StageRecipe, tmp_path / "resolved.yaml") == recipe


def test_wrong_key_wrong_type_and_impossible_value_come_in_one_message(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, optimizer={"lr": -1, "warmup": 3}, steps="many")
    lines = {key: n for n, line in enumerate(path.read_text().splitlines(), 1) for key in [line.strip()]}
    with pytest.raises(RecipeError) as error:
        load_recipe(StageRecipe, path)
    message = str(error.value)
    assert f"{path}:{lines['steps: many']}" in message
    assert f"{path}:{lines['lr: -1']}" in message
    assert f"{path}:{lines['warmup: 3']}" in message and "warmup_steps" in message
    assert "3 problems" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__warmup_steps": 7}, "optimizer.warmup_steps: 7 is above steps (6)"),
        ({"precision": "bfloat16", "zero__stage": 0}, "stage 0 keeps no float32 master"),
        ({"model__init_from": "somewhere"}, "exactly one of init_from, pretrained and random"),
        ({"model__random": None}, "found none of them"),
        ({"model__head": None}, "model.head: must be given"),
        ({"model__head__adaln": 2}, "multiple of adaln"),
        ({"model__grow_from": 2}, "needs init_from"),
        ({"optimizer__final_lr": 1.0}, "optimizer.final_lr: 1.0 is above lr"),
        ({"zero": {"stage": 2, "offload_param": {"device": "cpu"}}}, "zero.offload_param: needs stage 3"),
        (
            {"zero": {"stage": 2, "zero_hpz_partition_size": 8}},
            "zero.zero_hpz_partition_size: needs stage 3",
        ),
        ({"zero__offload_optimizer": {"device": "nvme"}}, "nvme_path"),
        (
            {"zero": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}},
            "zero.offload_optimizer: to nvme needs stage 3",
        ),
        (
            {"zero__offload_param": {"device": "nvme", "nvme_path": "/disk", "pin_memory": True}},
            "zero.offload_param.pin_memory: what is on a disk",
        ),
        ({"data__ratio": {128: 0}}, "whole weights"),
        ({"checkpoints__remote": ""}, "checkpoints.remote: '' is no address: expected s3://bucket/prefix"),
        ({"checkpoints__remote": "s3:/bucket/x"}, "'s3:/bucket/x' is no address"),
        ({"checkpoints__remote": "s4://bucket/x"}, "s4:// is not known"),
        ({"checkpoints__remote": "gs://bucket/x"}, "gs:// needs the package gcsfs"),
        ({"model__lora": {"rank": 4}}, "model.lora: needs init_from"),
        ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas.1: input should be less than 1, found 1.0"),
        ({"optimizer__lr": math.inf}, "optimizer.lr: input should be a finite number, found inf"),
        ({"loss": {"vision": math.nan}}, "loss.vision: input should be a finite number, found nan"),
        ({"zero": {"stage": 2, "allgather_bucket_size": 1001}}, "should be a multiple of 2, found 1001"),
        ({"model__lora": {"targets": []}}, "expected some of q_proj"),
        ({"model__lora": {"targets": ["q_proj", "q_proj"]}}, "each once"),
        ({"samples": {"every_steps": 1, "prompts": [], "size": [64, 64]}}, "at least 1 item"),
        ({"samples": {"every_steps": 1, "prompts": [" "], "size": [64, 64]}}, "samples.prompts.0: "),
    ],
)
def test_fields_that_do_not_agree_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be used") as error:
        load_recipe(StageRecipe, write_recipe(tmp_path, **changes))
    assert words in str(error.value)


def test_sizes_that_no_backbone_has_come_in_one_message(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 15, "hidden_size": 30}
    changes: dict[str, object] = {f"model__random__backbone__{name}": size for name, size in sizes.items()}
    with pytest.raises(RecipeError, match="4 problems") as error:
        load_recipe(StageRecipe, write_recipe(tmp_path, **changes, seed=-1))
    message = str(error.value)
    assert "backbone.num_attention_heads: 3 is no multiple of num_key_value_heads (2)" in message
    assert "backbone.head_dim: input should be a multiple of 2, found 15" in message
    assert "backbone.hidden_size: input should be a multiple of 4, found 30" in message


@pytest.mark.parametrize(
    ("stage", "unused"),
    [
        (0, ["overlap_comm", "reduce_bucket_size", "stage3_max_live_parameters"]),
        (1, ["stage3_max_live_parameters"]),
        (3, []),
    ],
)
def test_keys_without_effect_in_a_stage_are_known(tmp_path: Path, stage: int, unused: list[str]) -> None:
    keys = {"overlap_comm": False, "reduce_bucket_size": 10, "stage3_max_live_parameters": 10}
    recipe = load_recipe(StageRecipe, write_recipe(tmp_path, zero={"stage": stage, **keys}))
    assert recipe.zero.without_effect == unused


def test_own_export_is_no_start(tmp_path: Path) -> None:
    values = {"random": None, "head": None, "p": 4, "init_from": str(tmp_path / "run" / "export")}
    with pytest.raises(RecipeError, match="own export"):
        load_recipe(StageRecipe, write_recipe(tmp_path, model=values))


def test_the_helper_of_these_tests_writes_a_valid_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(StageRecipe, write_recipe(tmp_path))
    assert recipe.model_dump()["steps"] == recipe_values(tmp_path)["steps"]
