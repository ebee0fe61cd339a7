"""Whole tiny text-to-image models: the training pass, and sampled bits."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from golden_files import Golden, golden_files, settling
from transformers import Qwen3Config

from models.flow_settings import FlowSettings
from models.head import HeadConfig, draw_times
from models.layout import PackedBatch, Sample, SequenceTokens, attention_mask, from_patch_raster, pack
from models.projector import Projector
from models.text_to_image import TextToImageConfig, TextToImageModel


def golden_tokens(config: Mapping[str, Any], assistant: list[int]) -> SequenceTokens:
    special = config["special_ids"]
    res, query = (int(special[name].removesuffix("+i")) for name in ("res", "query"))
    return SequenceTokens(
        im_start=0,
        im_end=1,
        vision_start=special["boi"],
        vision_end=special["eoi"],
        res={k: res + k for k in range(1, 257)},
        query=tuple(query + i for i in range(1, config["parallel_num"])),
        user_prefix=(),
        turn_end=(),
        assistant=tuple(assistant),
    )


def golden_model(golden: Golden) -> TextToImageModel:
    config, state = golden.config, golden.group("param.")
    llm = Qwen3Config(**config["qwen3"])
    bits = state["projector.fc1.weight"].shape[1]
    sizes = {"ch_target": bits, "ch_cond": llm.hidden_size, "parallel_num": config["parallel_num"]}
    model = TextToImageModel(TextToImageConfig(llm, HeadConfig.from_json(sizes | config["head"])))
    if llm.tie_word_embeddings:  # then it may be stored once
        state.setdefault("llm.lm_head.weight", state["llm.model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True)
    return model.eval()


def golden_pack(golden: Golden, model: TextToImageModel) -> PackedBatch:
    """The teacher-forced sequence: text_ids stand before the picture, none of them a target."""
    h, w = golden.config["grid"]
    P = golden.config["parallel_num"]
    torch.manual_seed(golden.config["loss_seed"])
    t = draw_times(model.config.head, h * w // P)
    sample = Sample(
        bits=from_patch_raster(golden.tensor("train.bits"), h, w, model.config.p),
        h=h,
        w=w,
        caption_ids=(),
        drop_text=True,
        t=t,
        # The last recorded draw: before it stands n of t, which the uniform schedule does not draw.
        noise=golden.tensor(max(name for name in golden.names if name.startswith("noise.train."))),
    )
    tokens = golden_tokens(golden.config, golden.tensor("in.text_ids").tolist())
    return pack([sample], tokens, model.config.p)


@pytest.mark.parametrize("golden", golden_files("t2i_"))
def test_training_pass(golden: Golden) -> None:
    model = golden_model(golden)
    batch = golden_pack(golden, model)
    assert torch.equal(attention_mask(batch.document_ids, batch.block_ids), golden.tensor("train.mask"))
    with torch.no_grad():
        hidden, losses = model.hidden_states(batch), model(batch)
    torch.testing.assert_close(hidden, golden.tensor("train.hidden"), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses.vision, golden.tensor("train.vision_loss"), atol=1e-4, rtol=1e-4)
    assert losses.text.shape == (0,)


@pytest.mark.parametrize("golden", golden_files("t2i_"))
def test_sampled_bits(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever was drawn before."""
    model, config = golden_model(golden), golden.config
    draw = model.vision_head.sample
    for guidance in config["cfg"]:
        expected = golden.tensor(f"out.tokens_cfg{guidance:g}")
        monkeypatch.setattr(
            model.vision_head, "sample", settling(draw, expected.split(config["parallel_num"], dim=1))
        )
        torch.manual_seed(config["sample_seed"])
        bits = model.generate(
            golden.tensor("in.text_ids").tolist(),
            golden.tensor("in.uncond_ids").tolist(),
            *config["grid"],
            tokens=golden_tokens(config, []),
            num_images=config["num_images"],
            flow=FlowSettings(
                guidance, config["num_sampling_steps"], config.get("sampler", "euler_maruyama")
            ),
        )
        assert torch.equal(bits, expected)


@pytest.mark.parametrize("golden", golden_files("projector"))
def test_projector(golden: Golden) -> None:
    projector = Projector(golden.config["in_dim"], golden.config["out_dim"])
    projector.load_state_dict(golden.group("param."))
    with torch.no_grad():
        embedded = projector(golden.tensor("in.bits"))
    torch.testing.assert_close(embedded, golden.tensor("out.embed"), atol=1e-4, rtol=1e-4)
