"""The configs of a text-to-image folder: mistakes told together, and what of them an export hands on."""

import json
from pathlib import Path

import pytest
import tiny_models as cases
import torch
from small_folder import ROWS, TOKENIZER, edit, saved
from transformers import Qwen3Config, Qwen3ForCausalLM

from models.weights import (
    build_model,
    load_folder,
    open_folder,
    read_folder_config,
    save_folder,
    write_source,
)


@pytest.mark.parametrize(
    ("file", "changes", "explained"),
    [
        ("config.json", {"vocab_size": ROWS + 9}, f"vocab_size = {ROWS + 9}"),
        ("config.json", {"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ("config.json", {"head_dim": 32}, "head_dim = 32"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings = true"),
        ("vision_head_config.json", {"ch_target": 64}, "ch_target = 64"),
        ("vision_head_config.json", {"ch_latent": 256}, "ch_latent = 256"),
        ("vision_head_config.json", {"depth_latent": 3}, "depth_latent = 3"),
        ("vision_head_config.json", {"depth_adanln": 2}, "depth_adanln = 2"),
        ("vision_head_config.json", {"use_swiglu": False}, "use_swiglu = False"),
        ("vision_head_config.json", {"ch_cond": 128}, "ch_cond is 128"),
        ("vision_head_config.json", {"parallel_num": 64}, "parallel_num = 64"),
        ("vision_head_config.json", {"surprise": 1}, "surprise"),
        ("config.json", {"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_a_wrong_config_value_is_named(tmp_path: Path, file: str, changes: dict, explained: str) -> None:
    saved(tmp_path)
    edit(tmp_path / file, **changes)
    with pytest.raises(ValueError) as caught:
        open_folder(tmp_path)
    assert explained in str(caught.value)
    assert str(tmp_path) in str(caught.value)


NO_COUNT = (None, -1, 0, 1.5, "x", [], {}, True, 10**30, 1e400)
NO_POSITIVE = (None, -1, 0, "x", [], {}, True, 1e400, 10**400)
WRONG_VALUES: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), NO_COUNT),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), NO_COUNT),
    "max_position_embeddings": (*NO_COUNT, 10**400),
    "pad_token_id": ("x", -1, 1.0, True, ROWS, 10**400),
    "bos_token_id": ("x", -1, [1], ROWS),
    "attention_dropout": ("x", -0.1, 1.0, True),
    "initializer_range": NO_POSITIVE,
    "max_window_layers": ("x", -1, 1.5, 10**400),
    "rms_norm_eps": NO_POSITIVE,
    "rope_theta": NO_POSITIVE,
    "rope_parameters": ("x", [], {"rope_type": "yarn", "factor": 4.0}, {"rope_theta": 1.0}),
    "rope_scaling": ("x", [], {"rope_type": "linear", "factor": 2.0}),
    "hidden_act": (None, "x", "gelu", []),
    "use_sliding_window": (True, "x", 1.5),
    "layer_types": ("x", ["full_attention"], ["sliding_attention"] * 2),
    "attention_bias": (None, "x", 1),
    "tie_word_embeddings": (None, "x", 0),
    "eos_token_id": ("x", [1.5], -1, True, ROWS, [1, ROWS], [1, 10**400]),
}


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    saved(folder)
    return folder


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_values_that_no_backbone_has_are_refused_by_name(shared_folder: Path, name: str) -> None:
    path = shared_folder / "config.json"
    text = path.read_text()
    for value in WRONG_VALUES[name]:
        edit(path, **{name: value})
        try:
            with pytest.raises(
                ValueError,
                match=rf"config\.json: no language model.*\n- {name.replace('rope_parameters', 'rope_')}",
            ):
                read_folder_config(shared_folder)
        finally:
            path.write_text(text)


def test_all_wrong_values_are_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", num_attention_heads=None, hidden_act="x", rms_norm_eps="y")
    with pytest.raises(ValueError) as caught:
        open_folder(tmp_path)
    for line in (
        "- num_attention_heads is None; expected a valid integer",
        "- hidden_act is 'x'; expected 'silu'",
        "- rms_norm_eps is 'y'; expected a valid number",
    ):
        assert line in str(caught.value)
    edit(tmp_path / "config.json", num_attention_heads=3, layer_types=[], eos_token_id=[1, 10**6])
    edit(tmp_path / "vision_head_config.json", ch_latent=-1)
    with pytest.raises(ValueError) as caught:
        open_folder(tmp_path)
    for line in (
        "- hidden_act is 'x'",
        f"- eos_token_id is [1, 1000000]; expected less than vocab_size = {ROWS}",
        f"{tmp_path / 'vision_head_config.json'}: this head cannot be built:\n- ch_latent is -1",
    ):
        assert line in str(caught.value), (
            "what files and fields say, right ones and wrong ones, in one message"
        )
    assert "num_attention_heads is 3; expected a multiple of num_key_value_heads = 2" in str(caught.value)
    assert (
        "layer_types names 0 layers; expected num_hidden_layers = 2 of them, or null, and the weights "
        "model.layers.0.* to model.layers.1.*"
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("vision_head_config.json", {"ch_target": True}, "ch_target is True"),
        ("vision_head_config.json", {"parallel_num": True}, "parallel_num is True"),
        ("vision_head_config.json", {"time_shift": "x"}, "time_shift is 'x'"),
        ("vision_head_config.json", {"P_mean": None}, "P_mean is None"),
        ("vision_head_config.json", {"use_swiglu": "x"}, "use_swiglu is 'x'"),
        ("ae_config.json", {"gan_decoder": 1}, "gan_decoder = 1"),
    ],
)
def test_other_wrong_types_are_refused_by_name(tmp_path: Path, file: str, changes: dict, named: str) -> None:
    save_folder(cases.text_to_image(ROWS), TOKENIZER, tmp_path, cases.tokenizer_folder(tmp_path / "ae"))
    edit(tmp_path / file, **changes)
    with pytest.raises(ValueError, match=named):
        open_folder(tmp_path)


PUBLISHED = {  # as in the published 0.6B, but for what the tiny model's tensors decide
    "attention_dropout": 0.0,
    "bos_token_id": 43,
    "eos_token_id": [45, 43],
    "initializer_range": 0.02,
    "pad_token_id": 43,
    "max_window_layers": 28,
    "rope_scaling": None,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
}


@pytest.mark.parametrize("rope", ["rope_theta", "rope_parameters"])
def test_the_forms_of_transformers_4_and_5_are_read_alike(tmp_path: Path, rope: str) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    values = {
        k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("rope") and k != "dtype"
    }
    forms = {
        "rope_theta": {"rope_theta": 1_000_000},
        "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000}},
    }
    path.write_text(json.dumps(values | PUBLISHED | forms[rope]))
    source = open_folder(tmp_path)
    model = build_model(source)
    assert model.llm.model.embed_tokens.padding_idx is None, "every row learns"
    frequencies = model.llm.model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, 1_000_000.0 ** -(torch.arange(0, 16, 2) / 16))


def test_an_export_hands_on_what_others_read(tmp_path: Path) -> None:
    """Of the fields that nothing here computes with, the ones that transformers knows; never code to run."""
    saved(tmp_path / "a")
    handed_on = {
        "pad_token_id": 4,
        "bos_token_id": 5,
        "eos_token_id": [5, 6],
        "initializer_range": 0.5,
        "attention_dropout": 0.25,
        "max_window_layers": 7,
    }
    edit(tmp_path / "a" / "config.json", **handed_on, auto_map={"AutoModel": "evil--code.Model"})
    write_source(open_folder(tmp_path / "a"), tmp_path / "b")
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {name: values[name] for name in handed_on} == handed_on
    assert "auto_map" not in values
    llm = Qwen3ForCausalLM.from_pretrained(tmp_path / "b")
    assert llm.config.rope_theta == values["rope_theta"] == 10_000.0
    assert llm.model.embed_tokens.padding_idx == 4
    assert torch.equal(llm.lm_head.weight, load_folder(tmp_path / "a").model.llm.lm_head.weight)


def test_the_rotary_base_stands_where_the_published_code_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers 5 has written the file, which has it in `rope_parameters` alone."""
    save = Qwen3Config.save_pretrained

    def as_transformers_5(config: Qwen3Config, folder: Path) -> None:
        save(config, folder)
        values = json.loads((folder / "config.json").read_text())
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        (folder / "config.json").write_text(json.dumps(values))

    monkeypatch.setattr(Qwen3Config, "save_pretrained", as_transformers_5)
    model = saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == model.config.llm.rope_theta
    open_folder(tmp_path)
