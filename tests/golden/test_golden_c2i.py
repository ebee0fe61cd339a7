"""Class-conditional models against the published ones: loss in both modes, samples bit for bit."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from golden_files import Golden, golden_files, settling

from models.class_conditional import ClassConditionalConfig, ClassConditionalModel, sample
from models.class_conditional.order import to_sequence_order

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
MODELS = golden_files("c2i_")
# How the file's values were computed: read by the tests below, no part of the model.
OF_THE_TESTS = {"eval_loss_seed", "train_loss_seed", "sample_seed", "sample_steps", "cfg_schedule", "sampler"}


def model_config(values: Mapping[str, Any]) -> ClassConditionalConfig:
    """The model's part of a file's config; ValueError with the keys that neither it nor the tests know."""
    values = {key: value for key, value in values.items() if key not in OF_THE_TESTS}
    if values.pop("patch_size", 1) != 1:
        raise ValueError("patch_size: tokens that are joined into larger ones are no part of any model here")
    # A model of one token per step has no order to choose; its file leaves the mode empty.
    return ClassConditionalConfig.from_json({k: v for k, v in values.items() if v is not None})


def build(golden: Golden) -> ClassConditionalModel:
    model = ClassConditionalModel(model_config(golden.config))
    model.load_state_dict(golden.group("param."))
    return model.eval()


def test_no_key_of_a_config_is_passed_over() -> None:
    config = model_config({"time_schedule": "uniform", "time_shift": 2.0, "sample_seed": 1, "patch_size": 1})
    assert (config.head.time_schedule, config.head.time_shift) == ("uniform", 2.0)
    with pytest.raises(ValueError, match=r"unknown keys \['time_warp'\]"):
        model_config({"dim": 128, "time_warp": 2.0})
    with pytest.raises(ValueError, match="patch_size"):
        model_config({"patch_size": 2})


@pytest.mark.parametrize("golden", MODELS)
def test_loss_in_eval_mode(golden: Golden) -> None:
    model = build(golden)
    torch.manual_seed(golden.config["eval_loss_seed"])
    loss = model(golden.tensor("in.latents"), golden.tensor("in.labels")).mean()
    torch.testing.assert_close(loss, golden.tensor("out.loss_eval"), **TOLERANCE)


@pytest.mark.parametrize("golden", MODELS)
def test_loss_in_training_mode(golden: Golden) -> None:
    generator = torch.Generator().manual_seed(golden.config["train_loss_seed"])
    model = build(golden).train()
    loss = model(golden.tensor("in.latents"), golden.tensor("in.labels"), generator).mean()
    torch.testing.assert_close(loss, golden.tensor("out.loss_train_seeded"), **TOLERANCE)


@pytest.mark.parametrize("golden", MODELS)
def test_samples(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, but where a value before its sign is within 1e-4 of 0."""
    model = build(golden)
    draw = model.head.sample
    names = [n for n in golden.names if n.startswith("out.sample_cfg")]
    assert names
    for name in names:
        expected = golden.tensor(name)
        patches = to_sequence_order(expected, model.config).split(model.config.parallel_num, dim=1)
        monkeypatch.setattr(model.head, "sample", settling(draw, patches))
        torch.manual_seed(golden.config["sample_seed"])
        bits = sample(
            model,
            golden.tensor("in.labels")[: expected.shape[0]],
            float(name.removeprefix("out.sample_cfg")),
            steps=golden.config["sample_steps"],
            schedule=golden.config["cfg_schedule"],
            sampler=golden.config.get("sampler", "euler_maruyama"),
        )
        assert torch.equal(bits, expected), f"{(bits != expected).sum()} of {bits.numel()} bits differ"
