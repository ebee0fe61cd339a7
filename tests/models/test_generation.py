"""Generation against its slow definition, and what it refuses."""

import math

import pytest
import torch
from tiny_text_to_image import BITS, WIDTH, tiny_model, tiny_sample, tiny_tokens
from torch import Tensor

from models.flow_settings import FlowSettings
from models.layout import attention_mask, pack, positions_2d, to_patch_raster
from models.text_to_image import TextToImageModel
from models.tokenizer import binarize


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
    """One backbone forward a patch, none after the last, no logits; steps + 1 head passes a patch, for which
    the condition is embedded once a patch and the times once a picture."""
    model, tokens = tiny_model(), tiny_tokens()
    passes = {"backbone": 0, "head": 0, "condition": 0, "times": 0}

    def count(part: str) -> None:
        passes[part] += 1

    model.llm.model.layers[0].mlp.register_forward_hook(lambda *_: count("backbone"))
    model.vision_head.net.final_layer.register_forward_hook(lambda *_: count("head"))
    model.vision_head.net.cond_embed.register_forward_hook(lambda *_: count("condition"))
    model.vision_head.net.time_embed.register_forward_hook(lambda *_: count("times"))
    model.llm.lm_head.register_forward_hook(lambda *_: pytest.fail("logits of text"))
    model.generate(
        tokens.prompt([33]), tokens.unconditional_prompt(), 4, 4, tokens=tokens, flow=FlowSettings(2.0, 3)
    )
    assert passes == {"backbone": 4, "head": 4 * 4, "condition": 4, "times": 1}


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
    "a prompt that is text": ({"prompt_ids": "cat"}, "'cat' are no token ids: expected a list or a tensor"),
    "no prompt": ({"prompt_ids": None}, "None are no token ids"),
    "fractions for ids": ({"uncond_ids": [5, 1.5]}, r"\[5, 1.5\] are no token ids"),
    "two prompts in one": ({"prompt_ids": torch.ones(2, 3, dtype=torch.int64)}, "are no token ids"),
    "a size that is no whole number": (
        {"h": 4.0},
        "4.0x6 tokens in patches of side 2: expected whole",
    ),
    "a size that is text": ({"w": "6"}, "4x'6' tokens in patches"),
    "settings that are none": ({"flow": None}, "flow is None: expected FlowSettings"),
    "a seed for a generator": ({"generator": 5}, r"generator is 5: expected .*manual_seed"),
    "tokens that are none": ({"tokens": None}, "tokens is None: expected what `sequence_tokens` returns"),
    "tokens of larger patches": ({"tokens": tiny_tokens(4)}, "tokens has 15 query tokens: expected the 3"),
    "a prompt of another vocabulary": (
        {"prompt_ids": [5, 400, -1]},
        r"holds \[400, -1\]: expected token ids",
    ),
    "half a picture": ({"num_images": 1.5}, "num_images is 1.5: expected a whole number of at least 1"),
    "half a step": ({"flow": FlowSettings(2.0, 2.5)}, "steps is 2.5: expected a whole number"),  # type: ignore[arg-type]
    "guidance that is text": ({"flow": FlowSettings("2", 2)}, "guidance is '2'"),  # type: ignore[arg-type]
    "no steps": ({"flow": FlowSettings(2.0, 0)}, "steps is 0"),
    "an unknown sampler": ({"flow": FlowSettings(2.0, 2, "heun")}, "sampler is 'heun'"),
    "a side without a token": ({"h": 18}, "no <|res_18|> token"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused(case: str) -> None:
    changes, message = BAD_REQUESTS[case]
    request = {"prompt_ids": [5], "uncond_ids": [5], "h": 4, "w": 6, "flow": FlowSettings(2.0, 2)}
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**request | {"tokens": tiny_tokens()} | changes)  # type: ignore[arg-type]


def test_all_that_is_wrong_with_a_request_is_told_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        tiny_model().generate(None, [400], 4.0, 6, tokens=None, flow=FlowSettings(0, 0, ""), generator=7)  # type: ignore[arg-type]
    assert str(caught.value).count("; ") >= 7
    for name in ("4.0x6", "None are", "holds [400]", "tokens is", "guidance is", "steps is", "sampler is"):
        assert name in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_may_be_tensors(dtype: torch.dtype) -> None:
    model, tokens, flow = tiny_model(), tiny_tokens(), FlowSettings(2.0, 2)

    def draw(caption: list[int] | Tensor, unconditional: list[int] | Tensor) -> Tensor:
        prompt = tokens.prompt(caption)
        given = torch.tensor(prompt, dtype=dtype) if isinstance(caption, Tensor) else prompt
        generator = torch.Generator().manual_seed(1)
        return model.generate(given, unconditional, 4, 4, tokens=tokens, flow=flow, generator=generator)

    empty = tokens.unconditional_prompt()
    assert torch.equal(draw([33, 44], empty), draw(torch.tensor([33, 44]), torch.tensor(empty)))


def test_the_longest_prompt_fits() -> None:
    model, tokens = tiny_model(), tiny_tokens()
    model.generate([5] * 102, [5], 4, 6, tokens=tokens, flow=FlowSettings(2.0, 1))
