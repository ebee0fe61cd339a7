"""`bitdance plan`: the whole answer, and the arithmetic behind it."""

import json
import math
import re
from pathlib import Path
from statistics import mean

import pytest
from typer.testing import CliRunner

from foundation.errors import RecipeError
from foundation.recipes import load_recipe
from models.layout import PUBLISHED_SIZES
from models.text_to_image import preset
from trainer.costs import sample_cost
from trainer.plan.batches import AssumedDataset, batch_figures
from trainer.plan.cli import app
from trainer.plan.gpus import GPUS, find_gpu
from trainer.plan.model_size import QWEN_TEMPLATE, model_size
from trainer.plan.states import Parameters, state_bytes
from trainer.plan.work import HOST_ELEMENTS, HOST_LINK, Saving, network_bytes, run_time
from trainer.recipe import OffloadSection, StageRecipe, ZeroSection

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "configs/t2i/qwen3-0.6b/pt.yaml"
RECIPES = sorted((ROOT / "configs/t2i").rglob("*.yaml"))


@pytest.fixture
def here(monkeypatch):
    """Recipes name folders relative to the repository, none of which exist in a fresh checkout."""
    monkeypatch.chdir(ROOT)


def plan(*arguments: str) -> tuple[int, dict]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


def test_a_plan_that_fits(here):
    code, answer = plan(str(SMALL), "--gpus", "8")
    assert code == 0 and answer["fits"] and not answer["remedies"]
    memory = answer["memory"]
    assert memory["total"] < memory["available"]
    assert memory["states.master"] == pytest.approx(4 * answer["parameters"]["total"] / 8, rel=0.01)
    assert answer["checkpoint_bytes"] == 12 * answer["parameters"]["total"]
    assert answer["batch"]["utilization"] > 0.95 and answer["batch"]["imbalance"] < 1.03
    assert 1.0e12 < answer["dataset_bytes"] < 1.3e12  # 256M pictures of 1, 4 and 16 KiB as 2:7:1
    assert any("pt is not here" in line for line in answer["assumptions"])
    assert any("an upper bound: those of fused_kernels = auto" in line for line in answer["assumptions"])


def test_a_plan_that_does_not_fit_says_what_would(here):
    large = ["--gpus", "8", "--gpu", "a100-40g", "--set", "data.max_tokens=49152"]
    code, answer = plan(str(SMALL), *large, "--set", "activation_checkpointing=false")
    assert code == 78 and not answer["fits"]
    assert any("activation_checkpointing: true" in line for line in answer["remedies"])
    code, answer = plan(str(SMALL), *large, "--set", "fused_kernels=never")
    assert code == 0 and answer["fits"] and not any("fused" in line for line in answer["assumptions"])


def test_one_gpu_is_helped_by_host_memory_a_disk_or_adapters(here):
    recipe = str(ROOT / "configs/t2i/qwen3-1.7b/sft.yaml")
    code, answer = plan(recipe, "--gpus", "1", "--gpu", "a100-40g", "--set", "data.max_tokens=32768")
    assert code == 78
    lines = "\n".join(answer["remedies"])
    assert "nvme_path: FOLDER} on a disk" in lines and "of host memory for each rank" in lines
    assert "model.lora: {rank: 32}" in lines


def test_the_answer_for_a_person(here):
    done = CliRunner().invoke(app, [str(SMALL), "--gpus", "8"])
    for words in (
        "Memory of each GPU",
        "logits alone",
        "micro-steps",
        "MFU",
        "GPU hours",
        "Young/Daly",
        "fits",
    ):
        assert words in done.stdout


@pytest.mark.parametrize("name", ["ct", "sft", "distill"])
def test_a_stage_takes_its_size_from_the_recipes_before_it(here, name):
    path = ROOT / "configs/t2i" / f"{name}.yaml"
    size = model_size(load_recipe(StageRecipe, path), path)
    rows = 151_669 + 256 + (63 if name == "distill" else 15)
    wanted = preset("14b", 8 if name == "distill" else 4, vocabulary=rows)
    assert size.config.head == wanted.head
    assert size.config.llm.to_dict() == wanted.llm.to_dict()


def test_a_stage_whose_start_nobody_knows_is_refused(here, tmp_path):
    text = (ROOT / "configs/t2i/ct.yaml").read_text()
    (tmp_path / "ct.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"runs/t2i/14b/pt/export does not exist, and no recipe in"):
        model_size(load_recipe(StageRecipe, tmp_path / "ct.yaml"), tmp_path / "ct.yaml")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path == SMALL else pytest.mark.long) for path in RECIPES],
    ids=lambda path: str(path.relative_to(ROOT / "configs/t2i")),
)
def test_a_recipe_says_at_its_top_what_the_plan_says(here, path):
    top = path.read_text().partition("\nrun:")[0]
    command = re.search(r"bitdance plan (configs/\S+) --gpus (\d+) --gpu (\S+)", top)
    told = re.search(r"Hours +([\d.]+)(?: \(([\d,]+) GPU hours\))?: ([\d.]+) s a step at 40 % MFU", top)
    assert command and told and ROOT / command[1] == path
    code, answer = plan(command[1], "--gpus", command[2], "--gpu", command[3])
    hours, gpu_hours, step = told[1], told[2] or told[1], told[3]
    assert code == 0
    assert f"{answer['step_seconds']:.1f}" == step
    assert answer["run_seconds"] / 3600 == pytest.approx(float(hours), rel=0.01)
    assert answer["run_seconds"] / 3600 * answer["gpus"] == pytest.approx(
        float(gpu_hours.replace(",", "")), rel=0.01
    )


def test_an_unknown_gpu_is_refused_with_those_that_are_known():
    with pytest.raises(RecipeError, match=r"h100-80g"):
        find_gpu("h100")


def figures(ranks: int):
    recipe = load_recipe(StageRecipe, ROOT / "configs/t2i/pt.yaml")
    dataset = AssumedDataset([256, 512, 1024], 16)
    cost = sample_cost(preset("14b", 4))
    return recipe, batch_figures(recipe.data, dataset, 4, 32, ranks, recipe.steps, cost, QWEN_TEMPLATE), cost


def test_batches_are_those_of_training():
    recipe, batch, cost = figures(128)
    sides = {256: [(256, 256)], **PUBLISHED_SIZES}
    tokens = {name: mean(h * w / 256 for h, w in sizes) for name, sizes in sides.items()}
    picture = 0.2 * tokens[256] + 0.7 * tokens[512] + 0.1 * tokens[1024]
    assert batch.bits_bytes == pytest.approx(2560 * picture * 32 / 8, rel=0.02)
    # Captions of 70 tokens, nine of ten of them kept, and the template around them.
    assert batch.tokens / 2560 == pytest.approx(picture + 0.9 * (70 + 5) + 5, rel=0.03)
    # 6 FLOPs for each parameter that a token meets, and those of attention.
    assert batch.flops > 3 * cost.per_token * batch.tokens
    assert batch.flops < 1.3 * 6 * 16.5e9 * batch.tokens
    assert all(pack.tokens <= recipe.data.max_tokens for pack in batch.packs)


def test_time_of_a_step_is_work_over_rate():
    recipe, batch, _ = figures(128)
    gpu, parameters = GPUS["h100-80g"], Parameters((10**10,), 10**8, {})
    work = run_time(batch, gpu, 128, 0.4, recipe, parameters)
    assert work.compute_seconds == pytest.approx(batch.flops * batch.imbalance / (128 * 989e12 * 0.4))
    twice = run_time(batch, gpu, 128, 0.8, recipe, parameters)
    assert twice.compute_seconds == pytest.approx(work.compute_seconds / 2)
    assert twice.network_seconds == work.network_seconds
    assert run_time(batch, gpu, 1, 0.4, recipe, parameters).network_seconds == 0


def test_traffic_grows_with_micro_steps_only_where_it_does():
    def sent(stage: int, micro_steps: int) -> float:
        return network_bytes(parameters, ZeroSection(stage=stage), "bfloat16", micro_steps, 16).all_ranks

    parameters = Parameters((10**9,), 10**8, {})
    assert sent(1, 1) == sent(1, 8)
    assert sent(2, 2) - sent(2, 1) == 2e9 and sent(3, 2) - sent(3, 1) == 6e9
    parameters = Parameters((10**9,), 10**8, {}, frozen=(10**9,))
    assert sent(2, 2) - sent(2, 1) == 2e9 and sent(3, 2) - sent(3, 1) == 10e9


def test_a_second_copy_costs_memory_and_keeps_weights_off_the_network():
    recipe, batch, _ = figures(128)
    parameters = Parameters((10**9,) * 8, 10**8, {}, frozen=(10**9,))
    gpu = GPUS["h100-80g"]

    def planned(copy: int, ranks: int) -> tuple[int, float]:
        zero = ZeroSection(stage=3, zero_hpz_partition_size=copy)
        changed = recipe.model_copy(update={"zero": zero})
        weights = state_bytes(parameters, zero, "bfloat16", ranks, average=False).weights
        return weights, run_time(batch, gpu, ranks, 0.4, changed, parameters).network_seconds

    (alone, slow), (copied, fast) = planned(1, 128), planned(8, 128)
    assert copied - alone == 2 * 9e9 / 8
    # Gradients of each micro-step, and the trained weights once; the rest at the speed of a node's own links.
    across = 2 * 8e9 * (batch.micro_steps + 1) * 127 / 128 / (8 * gpu.network)
    within = 2 * (2 * batch.micro_steps * 9e9 - 8e9) * 7 / 8 / gpu.nvlink
    assert fast == pytest.approx(across + within) and fast < slow
    assert planned(8, 8)[1] == planned(1, 8)[1]
    assert planned(8, 1) == planned(1, 1)


def test_an_optimizer_in_host_memory_takes_its_time_on_its_threads():
    recipe, batch, _ = figures(128)
    zero = ZeroSection(stage=2, offload_optimizer=OffloadSection(device="cpu"))
    parameters = Parameters((16 * 10**9,), 10**8, {})

    def seconds(ranks: int, threads: int) -> float:
        world = recipe.world.model_copy(update={"threads": threads})
        changed = recipe.model_copy(update={"zero": zero, "world": world})
        work = run_time(batch, GPUS["h100-80g"], ranks, 0.4, changed, parameters)
        assert work.step_seconds == max(work.compute_seconds, work.network_seconds) + work.host_seconds
        return work.host_seconds

    way = 16e9 / 16 * (4 + 2) / HOST_LINK
    assert seconds(16, 1) == pytest.approx(1e9 * 2.5e-9 + way)  # a sixteenth of the elements
    assert seconds(16, 1000) == pytest.approx(
        1e9 * 8 / HOST_ELEMENTS + way
    )  # eight ranks share a node's memory
    assert run_time(batch, GPUS["h100-80g"], 16, 0.4, recipe, parameters).host_seconds == 0


def test_ranks_that_cannot_share_copies_are_refused(here):
    done = CliRunner().invoke(app, [str(SMALL), "--gpus", "12", "--set", "zero.zero_hpz_partition_size=8"])
    assert "zero.zero_hpz_partition_size is 8: 12 ranks are no multiple" in str(done.exception)


@pytest.mark.parametrize(("gpus", "minutes"), [(64, 87), (128, 62), (256, 44), (512, 31)])
def test_the_best_interval_is_youngs_and_no_other_is_better(gpus, minutes):
    saving = Saving(10**11, 8064 / gpus * 3600, stall_seconds=30)
    assert saving.best_seconds / 60 == pytest.approx(minutes, abs=1)
    others = [saving.effective_at(saving.best_seconds * factor) for factor in (0.5, 0.9, 1.1, 2)]
    assert saving.effective > max(others)
    assert math.isclose(saving.effective, saving.effective_at(saving.best_seconds))


@pytest.mark.parametrize("option", ["--mtbf-hours", "--stall-seconds", "--price"])
@pytest.mark.parametrize("value", ["-5", "nan", "inf"])
def test_figures_that_are_none_are_refused(option: str, value: str) -> None:
    done = CliRunner().invoke(app, [str(SMALL), "--gpus", "8", option, value])
    assert done.exit_code == 2 and option in done.output


def test_a_job_that_fails_all_the_time_is_refused() -> None:
    assert CliRunner().invoke(app, [str(SMALL), "--gpus", "8", "--mtbf-hours", "0"]).exit_code == 2
