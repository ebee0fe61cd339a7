"""Adapters as functions: names, start values, the merge; against peft itself."""

import math

import pytest
import torch
from small_stage import make_inputs, write_recipe

from foundation.recipes import load_recipe
from models.text_to_image import TextToImageModel
from models.weights import ModelSource, expected_specs
from trainer.adapters import (
    adapter_names,
    adapter_sizes,
    add_adapters,
    merged,
    parameter_name,
    seed_dropout,
    start_tensors,
)
from trainer.model_recipe import LoraSection
from trainer.plan.states import count_parameters
from trainer.recipe import StageRecipe
from trainer.stage_start import open_start

LORA = LoraSection(rank=3, alpha=6, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("adapters")
    make_inputs(folder)
    return open_start(load_recipe(StageRecipe, write_recipe(folder)))


@pytest.fixture
def adapted(source: ModelSource) -> TextToImageModel:
    model = TextToImageModel(source.config)
    add_adapters(model, LORA)
    return model


def test_names_are_those_of_the_model_with_adapters(source: ModelSource, adapted: TextToImageModel) -> None:
    names = {parameter_name(stored, LORA) for stored in source.specs}
    for stored in source.specs:
        names |= set(adapter_names(stored, LORA) or ())
    assert names == {name for name, _ in adapted.named_parameters()}


def test_only_the_backbone_is_frozen(adapted: TextToImageModel) -> None:
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (not name.startswith("llm.") or "lora_" in name), name


def test_adapters_start_as_peft_starts_them_and_the_same_each_time(
    source: ModelSource, adapted: TextToImageModel
) -> None:
    once, again = (dict(start_tensors(source, LORA, seed)) for seed in (0, 0))
    other = dict(start_tensors(source, LORA, 1))
    for name, theirs in adapted.named_parameters():
        assert once[name].shape == theirs.shape
        assert torch.equal(once[name], again[name])
        if "lora_A" in name:
            bound = 1 / math.sqrt(theirs.shape[1])
            assert once[name].abs().max() <= bound and theirs.abs().max() <= bound
            assert once[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.3)
            assert not torch.equal(once[name], other[name])
        if "lora_B" in name:
            assert not once[name].any() and not theirs.any()


def test_the_merge_is_pefts_own_and_base_plus_scaled_product(
    source: ModelSource, adapted: TextToImageModel
) -> None:
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    whole = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    ours = {stored: merged(stored, LORA, whole.__getitem__) for stored in source.specs}
    for module in adapted.modules():
        if hasattr(module, "merge"):
            module.merge()
    for stored, weight in ours.items():
        name = parameter_name(stored, LORA)
        assert torch.equal(weight, adapted.get_parameter(name)), stored
        pair = adapter_names(stored, LORA)
        if pair is not None:
            down, up = (whole[part] for part in pair)
            assert torch.equal(weight, whole[name] + 2.0 * (up @ down))
            assert not torch.equal(weight, whole[name])


def test_the_plan_counts_what_the_model_has(source: ModelSource, adapted: TextToImageModel) -> None:
    counted = count_parameters(source.config, LORA)
    trained = sorted(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = sorted(p.numel() for p in adapted.parameters() if not p.requires_grad)
    assert sorted(counted.sizes) == trained and sorted(counted.frozen) == frozen
    assert sum(counted.by_part.values()) == counted.all == sum(trained) + sum(frozen)
    assert adapter_sizes("llm.lm_head.weight", (10, 4), LORA) == ()
    assert expected_specs(source.config).keys() == source.specs.keys()


def test_what_is_dropped_depends_on_step_rank_and_micro_step_alone() -> None:
    def draw(*place: int) -> list[float]:
        seed_dropout(0, *place)
        return torch.rand(4).tolist()

    first = draw(5, 0, 1)
    torch.rand(100)  # whatever ran before
    assert draw(5, 0, 1) == first
    others = [draw(6, 0, 1), draw(5, 1, 1), draw(5, 0, 2)]
    assert first not in others and len({tuple(draws) for draws in others}) == 3
