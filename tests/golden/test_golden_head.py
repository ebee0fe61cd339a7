"""The diffusion head against the published one: net, loss per token, samples before hard signs."""

from dataclasses import fields

import pytest
import torch
from golden_files import Golden, golden_files

from models.head import DiffusionHead, HeadConfig

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
HEADS = golden_files("head_t2i_")


def build(golden: Golden) -> DiffusionHead:
    names = {f.name for f in fields(HeadConfig)}
    head = DiffusionHead(HeadConfig.from_json({k: v for k, v in golden.config.items() if k in names}))
    head.load_state_dict(golden.group("param."))
    return head.eval()


def with_output(prefix: str) -> list[object]:
    return [
        p
        if p.values[0] is None or any(n.startswith(prefix) for n in p.values[0].names)
        else pytest.param(p.values[0], id=p.id, marks=pytest.mark.skip(reason=f"the file holds no {prefix}*"))
        for p in HEADS
    ]


@pytest.mark.parametrize("golden", HEADS)
def test_net(golden: Golden) -> None:
    with torch.no_grad():
        x = build(golden).net(golden.tensor("in.x_t"), golden.tensor("in.t"), golden.tensor("in.cond"))
    torch.testing.assert_close(x, golden.tensor("out.x_pred"), **TOLERANCE)


@pytest.mark.parametrize("golden", HEADS)
def test_loss_draws_as_published(golden: Golden) -> None:
    head = build(golden)
    target, cond = golden.tensor("in.loss_target"), golden.tensor("in.loss_cond")
    # With diff_batch_mul = k the published loss has k times the rows, copy after copy; ours is their mean.
    expected = golden.tensor("out.loss").unflatten(0, (-1, len(target))).mean(dim=0)
    torch.manual_seed(golden.config["loss_seed"])
    torch.testing.assert_close(head.loss(target, cond), expected, **TOLERANCE)
    generator = torch.Generator().manual_seed(golden.config["loss_seed"])
    loss = head.loss(target, cond, generator=generator)
    torch.testing.assert_close(loss, expected, **TOLERANCE)


@pytest.mark.parametrize("golden", with_output("out.sample_cfg"))
def test_samples_draw_as_published(golden: Golden) -> None:
    head, cond = build(golden), golden.tensor("in.loss_cond")
    for name in (n for n in golden.names if n.startswith("out.sample_cfg")):
        expected = golden.tensor(name)
        torch.manual_seed(golden.config["sample_seed"])
        guidance = float(name.removeprefix("out.sample_cfg"))
        steps, sampler = golden.config["num_sampling_steps"], golden.config.get("sampler", "euler_maruyama")
        bits = head.sample(cond[: expected.shape[0]], guidance, steps=steps, sampler=sampler)
        torch.testing.assert_close(bits, expected, **TOLERANCE)
