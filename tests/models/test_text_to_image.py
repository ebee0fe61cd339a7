"""The text-to-image model: packed losses, idle packs, checkpointing, generation against a slow definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config

from models.backbone import BACKBONES, backbone_config
from models.generation import FlowSettings
from models.head import HeadConfig
from models.layout import Sample, SequenceTokens, attention_mask, pack, positions_2d, to_patch_raster
from models.text_to_image import TextToImageConfig, TextToImageModel, preset
from models.tokenizer import binarize

WIDTH, BITS, CONTEXT = 32, 6, 128


def tiny_config(p: int = 2, **changes: int) -> TextToImageConfig:
    sizes = {
        "vocab_size": 400,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
    }
    head = HeadConfig(
        ch_target=BITS, ch_cond=WIDTH, ch_latent=128, depth_latent=2, depth_adanln=2, parallel_num=p * p
    )
    return TextToImageConfig(Qwen3Config(**(sizes | changes)), head)


def tiny_model(p: int = 2, seed: int = 0) -> TextToImageModel:
    """Random weights everywhere: a fresh head predicts nothing, for its last layer starts at zero."""
    torch.manual_seed(seed)
    model = TextToImageModel(tiny_config(p)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(std=0.15)
    return model


def tiny_tokens(p: int = 2) -> SequenceTokens:
    return SequenceTokens(
        im_start=300,
        im_end=301,
        vision_start=302,
        vision_end=303,
        res={k: 310 + k for k in range(1, 17)},
        query=tuple(340 + i for i in range(1, p * p)),
        user_prefix=(300, 10, 11),
        turn_end=(301, 11),
        assistant=(300, 12, 11),
    )


def tiny_sample(seed: int, h: int = 4, w: int = 6, p: int = 2, **changes: object) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    patches = h * w // (p * p)
    fields: dict[str, object] = {
        "bits": torch.randint(0, 2, (h * w, BITS), generator=generator) * 2 - 1,
        "h": h,
        "w": w,
        "caption_ids": torch.randint(20, 200, (3 + seed % 4,), generator=generator).tolist(),
        "flip": torch.rand(h * w, BITS, generator=generator) < 0.1,
        "t": torch.rand(patches, generator=generator),
        "noise": torch.randn(patches, p * p, BITS, generator=generator),
        "key": str(seed),
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]


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


def test_packing_changes_neither_losses_nor_gradients() -> None:
    model = tiny_model()
    together = backward(model, [MIXED])
    apart = backward(model, [[sample] for sample in MIXED])
    for ours, theirs in zip(together[:2], apart[:2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for name, gradient in together[2].items():
        assert (gradient - apart[2][name]).norm() <= 1e-4 * gradient.norm(), name


def test_losses_count_what_is_learned() -> None:
    losses = tiny_model()(pack(MIXED, tiny_tokens(), 2))
    assert losses.vision.shape == ((24 + 4 + 24 + 12) // 4, 4)
    assert losses.text.shape == (sum(len(s.caption_ids) + 1 for s in MIXED if not s.drop_text),)
    assert losses.vision.dtype == losses.text.dtype == torch.float32


def test_text_loss_is_the_backbones_own() -> None:
    """Against transformers' own attention, logits of all places, and labels read off the sequence."""
    model, tokens = tiny_model(), tiny_tokens()
    caption = [50, 60, 70, 80]
    sample = tiny_sample(0, caption_ids=caption)
    losses = model(pack([sample], tokens, 2))
    model.llm.set_attn_implementation("eager")
    ids = torch.tensor([[*tokens.user_prefix, *caption, tokens.im_end]])
    logits = model.llm(input_ids=ids).logits[0]
    expected = F.cross_entropy(logits[2:-1], ids[0, 3:], reduction="none")
    torch.testing.assert_close(losses.text, expected, atol=1e-4, rtol=1e-4)


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


def slow_generation(
    model: TextToImageModel, prompts: list[list[int]], h: int, w: int, n: int, guidance: float, steps: int
) -> Tensor:
    """Every patch by a forward over everything so far, picture by picture and half by half: no cache."""
    p, P = model.config.p, model.config.head.parallel_num
    table = positions_2d(h, w, WIDTH, p)
    bits = torch.zeros(n, 0, BITS)
    for patch in range(h * w // P):
        conditions = []
        for prompt in prompts:
            for image in range(n):
                ids = torch.tensor([*prompt, *tiny_tokens(p).picture_start(h, w)])
                text = model.llm.get_input_embeddings()(ids)
                vision = model.projector(bits[image]) + table[: patch * P]
                sequence = torch.cat([text, vision])
                blocks = torch.cat([torch.full((len(prompt) + 2,), -1), torch.arange((patch + 1) * P) // P])
                mask = attention_mask(torch.zeros_like(blocks), blocks)
                model.llm.set_attn_implementation("eager")
                hidden = model.llm.model(
                    inputs_embeds=sequence[None],
                    attention_mask={"full_attention": torch.where(mask, 0.0, -torch.inf)[None, None]},
                    position_ids=torch.arange(len(sequence))[None],
                ).last_hidden_state[0]
                conditions.append(hidden[-P:] + table[patch * P : (patch + 1) * P])
        drawn = model.vision_head.sample(torch.stack(conditions), guidance, steps=steps)
        bits = torch.cat([bits, binarize(drawn[:n])], dim=1)
    return bits


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_generation_is_its_slow_definition(guidance: float) -> None:
    model, slow_model, tokens = tiny_model(), tiny_model(), tiny_tokens()
    prompts = [tokens.prompt([33, 44, 55, 66, 77]), tokens.unconditional_prompt()]
    torch.manual_seed(5)
    fast = model.generate(*prompts, 4, 6, tokens=tokens, num_images=2, flow=FlowSettings(guidance, 3))
    torch.manual_seed(5)
    used = prompts if guidance > 1 else prompts[:1]
    slow = slow_generation(slow_model, used, 4, 6, 2, guidance, steps=3)
    assert fast.shape == (2, 24, BITS) and set(fast.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(fast, slow)
    assert not torch.equal(fast[0], fast[1])


def test_generation_computes_nothing_in_vain() -> None:
    """One backbone forward a patch, none after the last, no logits; steps + 1 head passes a patch."""
    model, tokens = tiny_model(), tiny_tokens()
    passes = {"backbone": 0, "head": 0}

    def count(part: str) -> None:
        passes[part] += 1

    model.llm.model.layers[0].mlp.register_forward_hook(lambda *_: count("backbone"))
    model.vision_head.net.final_layer.register_forward_hook(lambda *_: count("head"))
    model.llm.lm_head.register_forward_hook(lambda *_: pytest.fail("logits of text"))
    model.generate(
        tokens.prompt([33]), tokens.unconditional_prompt(), 4, 4, tokens=tokens, flow=FlowSettings(2.0, 3)
    )
    assert passes == {"backbone": 4, "head": 4 * 4}


def test_a_generator_decides_the_picture() -> None:
    model, tokens = tiny_model(), tiny_tokens()

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        prompts = tokens.prompt([33]), tokens.unconditional_prompt()
        return model.generate(*prompts, 4, 4, tokens=tokens, flow=FlowSettings(2.0, 3), generator=generator)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_training_and_generation_share_one_sequence() -> None:
    """Hidden states of the teacher-forced pass are those that generation conditions the head on."""
    model, tokens = tiny_model(), tiny_tokens()
    caption = [33, 44]
    prompt = tokens.prompt(caption)
    conditions: list[Tensor] = []
    draw = model.vision_head.sample
    model.vision_head.sample = lambda cond, *args, **kwargs: (  # type: ignore[method-assign]
        conditions.append(cond.clone()) or draw(cond, *args, **kwargs)
    )
    bits = model.generate(prompt, prompt, 4, 6, tokens=tokens, flow=FlowSettings(1.0, 2))[0]
    plain = torch.empty_like(bits)
    plain[to_patch_raster(torch.arange(24), 4, 6, 2)] = bits
    batch = pack([tiny_sample(0, bits=plain, caption_ids=caption, flip=None)], tokens, 2)
    with torch.no_grad():
        hidden = model.hidden_states(batch)[batch.predict_at] + positions_2d(4, 6, WIDTH, 2)
    torch.testing.assert_close(torch.cat(conditions, dim=1)[0], hidden, atol=1e-4, rtol=1e-4)


BAD_REQUESTS = {
    "a size that does not fit": ({"h": 5}, "5x6 tokens can't be cut into 2x2 patches"),
    "an empty prompt": ({"prompt_ids": []}, "a prompt is empty"),
    "an empty unconditional prompt": ({"uncond_ids": []}, "a prompt is empty"),
    "a prompt beyond the context": (
        {"prompt_ids": [5] * 103},
        "exceed the context of 128 tokens: shorten .* 102",
    ),
    "guidance below 1": ({"flow": FlowSettings(0.5, 2)}, "guidance is 0.5: expected a number of at least 1"),
    "guidance that is no number": ({"flow": FlowSettings(math.nan, 2)}, "guidance is nan"),
    "no pictures": ({"num_images": 0}, "num_images is 0"),
    "no steps": ({"flow": FlowSettings(2.0, 0)}, "steps is 0"),
    "an unknown sampler": ({"flow": FlowSettings(2.0, 2, "heun")}, "sampler: found 'heun'"),
    "a side without a token": ({"h": 18}, "no <|res_18|> token"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused(case: str) -> None:
    changes, message = BAD_REQUESTS[case]
    request = {"prompt_ids": [5], "uncond_ids": [5], "h": 4, "w": 6, "flow": FlowSettings(2.0, 2)} | changes
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**request, tokens=tiny_tokens())  # type: ignore[arg-type]


def test_the_longest_prompt_fits() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    model.generate([5] * 102, [5], 4, 6, tokens=tokens, flow=FlowSettings(2.0, 1))


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
