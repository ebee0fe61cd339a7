"""The text-to-image model: packed losses, idle packs, checkpointing, presets."""

import pytest
import torch
import torch.nn.functional as F
from tiny_text_to_image import WIDTH, tiny_config, tiny_model, tiny_sample, tiny_tokens
from torch import Tensor

from models.backbone import BACKBONES, backbone_config
from models.head import HeadConfig
from models.layout import Sample, pack, positions_2d
from models.text_to_image import TextToImageConfig, TextToImageModel, preset

MIXED = [
    tiny_sample(0),
    tiny_sample(1, task="i2t"),
    tiny_sample(2, h=2, w=2),
    tiny_sample(3, drop_text=True),
    tiny_sample(4, h=6, w=2),
]


def gradients(model: TextToImageModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} was not reached"
        found[name] = parameter.grad.clone()
    return found


def backward(model: TextToImageModel, packs: list[list[Sample]]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Vision and text losses of all packs in order, and the gradients of their sum."""
    model.zero_grad()
    losses = [model(pack(samples, tiny_tokens(), 2)) for samples in packs]
    vision, text = (torch.cat([getattr(loss, part) for loss in losses]) for part in ("vision", "text"))
    (vision.sum() + 0.01 * text.sum()).backward()
    return vision.detach(), text.detach(), gradients(model)


def test_the_projector_by_its_formula() -> None:
    """GELU in its tanh approximation, which the exact one is up to 5e-4 away from."""
    projector = tiny_model().projector.double()
    bits = tiny_sample(0).bits.double()
    inner = bits @ projector.fc1.weight.T + projector.fc1.bias
    inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    expected = inner @ projector.fc2.weight.T + projector.fc2.bias
    torch.testing.assert_close(projector(bits), expected, atol=1e-12, rtol=0)


def test_packing_changes_neither_losses_nor_gradients() -> None:
    model = (
        tiny_model().double()
    )  # in float32 sums of losses near 15 differ between CPUs by more than a bound
    together = backward(model, [MIXED])
    apart = backward(model, [[sample] for sample in MIXED])
    for ours, theirs in zip(together[:2], apart[:2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for name, gradient in together[2].items():
        assert (gradient - apart[2][name]).norm() <= 1e-9 * gradient.norm(), name


def test_losses_count_what_is_learned() -> None:
    losses = tiny_model()(pack(MIXED, tiny_tokens(), 2))
    assert losses.vision.shape == ((24 + 4 + 24 + 12) // 4, 4)
    assert losses.text.shape == (sum(len(s.caption_ids) + 1 for s in MIXED if not s.drop_text),)
    assert losses.vision.dtype == losses.text.dtype == torch.float32


def test_vision_loss_is_the_heads_where_each_token_is_predicted() -> None:
    """Hidden states reach the head with the 2D position of the token that each of them predicts."""
    model, batch = tiny_model(), pack([tiny_sample(0, h=4, w=6)], tiny_tokens(), 2)
    with torch.no_grad():
        vision, hidden = model(batch).vision, model.hidden_states(batch)[batch.predict_at]
        condition = (hidden + positions_2d(4, 6, WIDTH, 2)).unflatten(0, (-1, 4))
        expected = model.vision_head.loss(batch.target_bits, condition, t=batch.t, noise=batch.noise)
    torch.testing.assert_close(vision, expected)


def test_text_loss_is_the_backbones_own() -> None:
    """Against transformers' own attention, logits of all places, and labels read off the sequence."""
    model, tokens = tiny_model().double(), tiny_tokens()
    caption = [50, 60, 70, 80]
    sample = tiny_sample(0, caption_ids=caption)
    losses = model(pack([sample], tokens, 2))
    model.llm.set_attn_implementation("eager")
    ids = torch.tensor([[*tokens.user_prefix, *caption, tokens.im_end]])
    logits = model.llm(input_ids=ids).logits[0]
    expected = F.cross_entropy(logits[2:-1], ids[0, 3:], reduction="none")
    torch.testing.assert_close(losses.text, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("samples", "vision", "text"),
    [
        ([], 0, 0),
        ([tiny_sample(1, task="i2t")], 0, 5),
        ([tiny_sample(1, drop_text=True)], 6, 0),
        ([tiny_sample(2, h=2, w=2, drop_text=True)], 1, 0),
    ],
    ids=["idle", "no picture to predict", "no text to predict", "no vision token fed"],
)
def test_every_parameter_is_reached_whatever_is_missing(
    samples: list[Sample], vision: int, text: int
) -> None:
    model = tiny_model()
    calls: list[str] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(pack(MIXED, tiny_tokens(), 2))
    usual, calls[:] = list(calls), []
    losses = model(pack(samples, tiny_tokens(), 2))
    assert calls == usual  # a partitioned model gathers weights by these calls, on all ranks alike
    assert (len(losses.vision), len(losses.text)) == (vision, text)
    (losses.vision.sum() + losses.text.sum()).backward()
    found = gradients(model)
    if not samples:
        assert all(not gradient.any() for gradient in found.values())
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_activation_checkpointing_changes_nothing() -> None:
    model = tiny_model().train()
    plain = backward(model, [MIXED])
    names = list(model.state_dict())
    model.enable_activation_checkpointing()
    runs = []
    model.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append("layer"))
    model.vision_head.net.res_blocks[0].attn.register_forward_pre_hook(lambda *_: runs.append("block"))
    again = backward(model, [MIXED])
    assert sorted(runs) == ["block", "block", "layer", "layer"]  # forward, and once more in backward
    assert list(model.state_dict()) == names
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
    for name, gradient in plain[2].items():
        assert torch.equal(gradient, again[2][name]), name


def test_bfloat16_weights_keep_float32_losses() -> None:
    model = tiny_model().bfloat16()
    losses = model(pack(MIXED, tiny_tokens(), 2))
    assert losses.vision.dtype == losses.text.dtype == torch.float32
    reference = tiny_model()(pack(MIXED, tiny_tokens(), 2))
    assert losses.vision.mean().item() == pytest.approx(reference.vision.mean().item(), rel=0.05)


def test_parts_that_do_not_fit_are_refused_together() -> None:
    good = tiny_config()
    head = HeadConfig(
        ch_target=6, ch_cond=40, ch_latent=128, depth_latent=2, parallel_num=8, diff_batch_mul=4
    )
    with pytest.raises(ValueError) as error:
        TextToImageConfig(good.llm, head)
    for complaint in (
        "parallel_num is 8",
        "ch_cond is 40, expected the backbone's hidden_size 32",
        "diff_batch_mul",
    ):
        assert complaint in str(error.value)


# Parameters of the published language models, without the input embedding where it is tied.
QWEN3_PARAMETERS = {
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
}


def head_parameters(width: int, bits: int) -> int:
    """Six blocks as wide as the backbone and two adaLN projections, counted by hand."""
    hidden = width * 3 // 2
    attention = 4 * width * width + 4 * width
    swiglu = 2 * hidden * (width + 1) + width * (hidden + 1)
    block = attention + swiglu + 4 * width  # two LayerNorms
    time = (256 + 1) * width + (width + 1) * width
    inputs = (bits + 1) * width + (width + 1) * width
    final = (width + 1) * 2 * width + (width + 1) * bits
    return 6 * block + 2 * (width + 1) * 6 * width + time + inputs + final


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_counts_of_the_presets(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = TextToImageModel(config)
    width = config.llm.hidden_size
    projector = (32 + 1) * width + (width + 1) * width
    assert sum(p.numel() for p in model.llm.parameters()) == QWEN3_PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == (
        QWEN3_PARAMETERS[name] + head_parameters(width, 32) + projector
    )


def test_the_published_preset() -> None:
    llm, head = preset("14b").llm, preset("14b").head
    assert (llm.num_hidden_layers, llm.hidden_size, llm.num_attention_heads, llm.num_key_value_heads) == (
        40,
        5120,
        40,
        8,
    )
    assert (head.depth_latent, head.ch_latent, head.depth_adanln, head.parallel_num) == (6, 5120, 2, 16)
    assert preset("14b", p=8).head.parallel_num == 64 and preset("14b", p=8).p == 8


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'70b': expected one of 0\.6b"):
        backbone_config("70b")
