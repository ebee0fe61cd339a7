"""Class-conditional models against the published ones: loss in both modes, samples bit for bit."""

from dataclasses import fields

import pytest
import torch
from golden_files import Golden, golden_files, settling

from models.class_conditional import ClassConditionalConfig, ClassConditionalModel, sample
from models.class_conditional.order import to_sequence_order

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
MODELS = golden_files("c2i_")


def build(golden: Golden) -> ClassConditionalModel:
    # The other keys say how the file's values were computed.
    names = {f.name for f in fields(ClassConditionalConfig)}
    # A model of one token per step has no order to choose; its file leaves the mode empty.
    values = {k: v for k, v in golden.config.items() if k in names and v is not None}
    model = ClassConditionalModel(ClassConditionalConfig.from_json(values))
    model.load_state_dict(golden.group("param."))
    return model.eval()


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
