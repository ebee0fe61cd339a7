"""What the plan says of memory, against real bytes and against plain counts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.text_to_image import TextToImageModel, preset
from trainer.plan.live_bytes import LiveBytes
from trainer.plan.states import Parameters, communication_bytes, count_parameters, state_bytes
from trainer.recipe import OffloadSection, ZeroSection

_FILE = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
_SPEC = importlib.util.spec_from_file_location("plan_memory", _FILE)
assert _SPEC and _SPEC.loader
plan_memory = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plan_memory)


def test_states_are_within_ten_percent_of_a_real_run_on_two_ranks():
    for case, (planned, held) in plan_memory.compare_states(
        ["1-bfloat16", "2-bfloat16", "3-bfloat16", "1-bfloat16-cpu", "2-bfloat16-cpu", "3-bfloat16-cpu"]
    ).items():
        assert planned == pytest.approx(held, rel=0.1), case


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_those_of_a_real_forward_and_backward(checkpointing):
    planned, held = plan_memory.compare_activations(checkpointing)
    assert planned == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize(("backbone", "billions"), [("14b", 16.55), ("0.6b", 0.67)])
def test_parameters_are_counted_as_the_model_has_them(backbone, billions):
    config = preset(backbone, 4, vocabulary=151_940)
    with torch.device("meta"):
        model = TextToImageModel(config)
    counted = count_parameters(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert sum(counted.by_part.values()) == counted.total
    assert counted.in_layer == sum(p.numel() for p in model.llm.model.layers[0].parameters())
    assert counted.total / 1e9 == pytest.approx(billions, rel=0.02)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    st.sampled_from([1, 2, 3, 8, 128]),
    st.sampled_from([1, 2, 3]),
)
def test_states_shrink_with_ranks_and_offload_moves_them(sizes, ranks, stage):
    parameters = Parameters(tuple(sizes), sizes[0], {})
    zero = ZeroSection(stage=stage)
    alone = state_bytes(parameters, zero, "bfloat16", 1, average=True)
    shared = state_bytes(parameters, zero, "bfloat16", ranks, average=True)
    assert shared.master + shared.moments + shared.average <= alone.master + alone.moments + alone.average
    assert ranks * shared.master >= 4 * parameters.total
    away = zero.model_copy(update={"offload_optimizer": OffloadSection(device="cpu")})
    moved = state_bytes(parameters, away, "bfloat16", ranks, average=True)
    # What is computed with stays; beside what moves there are gradients of the rank's share, and buffers.
    assert moved.weights == shared.weights and moved.master == moved.moments == moved.average == 0
    assert shared.device <= moved.device + moved.host and moved.device <= shared.device + 2 * max(sizes)


def test_gathered_weights_are_limited_as_the_recipe_says():
    parameters = Parameters((10**9, 10**9), 10**8, {})
    open_handed = communication_bytes(parameters, ZeroSection(stage=3), "bfloat16", 8)
    frugal = ZeroSection(stage=3, reduce_bucket_size=10**7, stage3_max_live_parameters=10**7)
    assert communication_bytes(parameters, frugal, "bfloat16", 8) < open_handed
    assert communication_bytes(parameters, ZeroSection(stage=0), "float32", 1) == 0


def test_live_bytes_counts_storages_once_and_until_they_die():
    with LiveBytes() as counter:
        one = torch.zeros(1000)
        view = one.view(10, 100)[2:]
        two = torch.ones(500)
        del two
        three = torch.ones(250)
    assert counter.peak == 6000 and counter.now == 5000
    del one
    assert counter.now == 5000  # the view keeps it
    del view, three
    assert counter.now == 0
