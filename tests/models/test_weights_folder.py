"""The published text-to-image folder: bit-exact round trips, strict reading, and plain transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as cases
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from models.tensor_files.safetensors_files import Place, SafetensorsWriter
from models.tensor_files.strict import specs_in
from models.text_to_image import TextToImageModel
from models.weights import (
    FolderWriter,
    build_model,
    load_folder,
    open_folder,
    read_folder_config,
    save_folder,
    stored_specs,
    write_source,
)

TOKENIZER = cases.text_tokenizer(4)
ROWS = len(TOKENIZER) + 5  # as Qwen, whose embedding has more rows than its tokenizer has tokens


def saved(folder: Path, **options: object) -> TextToImageModel:
    model = cases.text_to_image(ROWS, **options)  # type: ignore[arg-type]
    save_folder(model, TOKENIZER, folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_changes_no_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = cases.text_to_image(ROWS, tied=tied).to(dtype)
    save_folder(
        model, TOKENIZER, tmp_path, cases.tokenizer_folder(tmp_path / "ae"), {"lineage.json": {"step": 7}}
    )
    loaded = load_folder(tmp_path, dtype=None)
    state, again = model.state_dict(), loaded.model.state_dict()
    assert list(state) == list(again)
    assert all(
        torch.equal(value, again[name]) and again[name].dtype == dtype for name, value in state.items()
    )
    assert loaded.text_tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.tokens.query == tuple(
        TOKENIZER.convert_tokens_to_ids(f"<|query_{i}|>") for i in range(1, 16)
    )
    assert loaded.tokenizer_folder == tmp_path
    assert json.loads((tmp_path / "lineage.json").read_text()) == {"step": 7}
    # Tied weights are one tensor again, and what RoPE computes is there, in float32.
    assert (loaded.model.llm.lm_head.weight is loaded.model.llm.model.embed_tokens.weight) == tied
    assert not loaded.model.training
    fresh = cases.text_to_image(ROWS, tied=tied)
    for (name, buffer), (_, other) in zip(fresh.named_buffers(), loaded.model.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_the_files_are_those_of_the_published_layout(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "projector.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vision_head.safetensors",
        "vision_head_config.json",
    }
    assert set(load_file(tmp_path / "projector.safetensors")) == {
        "fc1.bias",
        "fc1.weight",
        "fc2.bias",
        "fc2.weight",
    }
    assert all(name.startswith("net.") for name in load_file(tmp_path / "vision_head.safetensors"))
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.llm.state_dict())
    assert json.loads((tmp_path / "vision_head_config.json").read_text())["parallel_num"] == 16
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_shards_respect_their_size_and_read_back_the_same(tmp_path: Path) -> None:
    model = cases.text_to_image(ROWS)
    state, limit = model.state_dict(), 40_000
    writer = FolderWriter(tmp_path, model.config, stored_specs(model), shard_bytes=limit)
    for name in reversed(writer.names):  # any order will do
        writer.add(name, state[name])
    writer.finish(TOKENIZER)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"]) == set(model.llm.state_dict())
    for shard in shards:
        tensors = load_file(shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    cases.assert_same(load_folder(tmp_path).model, model)


def test_plain_transformers_loads_what_we_export(tmp_path: Path) -> None:
    folders = []
    for tied in (True, False):
        model = cases.text_to_image(ROWS, tied=tied)
        for shard_bytes in (40_000, 10**9):
            folder = tmp_path / f"{tied}-{shard_bytes}"
            writer = FolderWriter(folder, model.config, stored_specs(model), shard_bytes)
            for name in writer.names:
                writer.add(name, model.state_dict()[name])
            writer.finish(TOKENIZER)
            torch.save(model.llm.state_dict(), folder / "expected.pt")
            folders.append(str(folder))
    # A process of its own, so that nothing of this package is registered with transformers.
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.use_cache
    state, expected = model.state_dict(), torch.load(folder + "/expected.pt", weights_only=True)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<|im_start|>user\\na cat<|im_end|><|res_16|><|query_15|>", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
assert not [name for name in sys.modules if name == "models" or name.startswith("models.")]
print(ids.tolist()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *folders], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = "<|im_start|>user\na cat<|im_end|><|res_16|><|query_15|>"
    assert json.loads(done.stdout) == TOKENIZER.encode(text)


def test_an_export_of_an_export_is_the_same_bytes(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    write_source(open_folder(tmp_path / "a"), tmp_path / "b")
    # (special_tokens_map.json says the same in another spelling once a tokenizer has been loaded)
    for path in [*(tmp_path / "a").glob("*.safetensors"), *(tmp_path / "a").glob("*config.json")]:
        if path.name == "tokenizer_config.json":
            continue
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_config_is_read_without_weights(tmp_path: Path) -> None:
    model = saved(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    config = read_folder_config(tmp_path)
    assert (config.p, config.head, config.tokenizer_downsample) == (4, model.config.head, 16)
    assert config.llm.num_hidden_layers == 2


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def test_all_faults_are_listed_with_the_config_value_behind_each(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", num_hidden_layers=3, layer_types=None, intermediate_size=100)
    head = load_file(tmp_path / "vision_head.safetensors")
    head["net.extra"] = torch.zeros(3)
    save_file(head, tmp_path / "vision_head.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        load_folder(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "11 missing:" in message
    assert "llm.model.layers.2.self_attn.q_norm.weight [16] (config.json: num_hidden_layers = 3" in message
    assert "1 unexpected:\n  vision_head.net.extra [3]" in message
    assert "6 misshapen:" in message
    assert (
        "llm.model.layers.0.mlp.down_proj.weight is [64, 96], expected [64, 100] "
        "(config.json: num_hidden_layers = 3, intermediate_size = 100, hidden_size = 64)"
    ) in message


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
    assert "layer_types names 0 layers; expected num_hidden_layers = 2" in str(caught.value)


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


def test_a_copy_of_tied_embeddings_is_accepted_only_where_it_is_one(tmp_path: Path) -> None:
    model = saved(tmp_path, tied=True)
    llm = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in llm
    llm["lm_head.weight"] = llm["model.embed_tokens.weight"].clone()
    save_file(llm, tmp_path / "model.safetensors", metadata={"format": "pt"})
    cases.assert_same(load_folder(tmp_path).model, model)
    llm["lm_head.weight"][0, 0] += 1
    save_file(llm, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_folder(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "vision_head_config.json", "tokenizer.json"])
def test_absent_and_broken_files_are_named(tmp_path: Path, file: str) -> None:
    saved(tmp_path)
    for text in ("{ broken", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"):
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=str(tmp_path)):
            open_folder(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=file):
        open_folder(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "vision_head.safetensors", "projector.safetensors"])
def test_truncated_and_absent_weights_are_named(tmp_path: Path, file: str) -> None:
    saved(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{file}: not a whole safetensors file"):
        open_folder(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: no such file"):
        open_folder(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    projector = load_file(tmp_path / "projector.safetensors")
    projector["fc1.bias"] = projector["fc1.bias"].to(torch.int8)
    save_file(projector, tmp_path / "projector.safetensors")
    with pytest.raises(ValueError, match=r"fc1\.bias is stored as I8; expected one of F64, F32, F16, BF16"):
        open_folder(tmp_path)


def test_a_tokenizer_of_other_sizes_is_refused(tmp_path: Path) -> None:
    model = cases.text_to_image(ROWS)
    save_folder(model, TOKENIZER, tmp_path, cases.tokenizer_folder(tmp_path / "ae", bits=16))
    with pytest.raises(ValueError, match=r"z_channels = 16, but .* ch_target = 32"):
        open_folder(tmp_path)
    cases.tokenizer_folder(tmp_path)
    edit(tmp_path / "ae_config.json", gan_decoder=True)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight is .* gan_decoder = True"):
        open_folder(tmp_path)


def test_the_writer_refuses_what_is_not_in_its_plan(tmp_path: Path) -> None:
    model = cases.text_to_image(ROWS)
    writer = FolderWriter(tmp_path, model.config, stored_specs(model))
    bias = model.projector.fc1.bias
    with pytest.raises(ValueError, match=r"llm\.other: not among"):
        writer.add("llm.other", bias)
    with pytest.raises(ValueError, match=r"is \[2\], expected \[64\]"):
        writer.add("projector.fc1.bias", bias[:2])
    writer.add("projector.fc1.bias", bias)
    with pytest.raises(ValueError, match="written already"):
        writer.add("projector.fc1.bias", bias)
    with pytest.raises(ValueError, match=r"66 tensors were not given to the writer: llm\.lm_head\.weight"):
        writer.finish(TOKENIZER)
    assert not (tmp_path / "config.json").exists()


def test_the_writer_copies_and_converts(tmp_path: Path) -> None:
    model = cases.text_to_image(ROWS)
    specs = {name: spec._replace(dtype=torch.bfloat16) for name, spec in stored_specs(model).items()}
    writer = FolderWriter(tmp_path, model.config, specs)
    state = model.state_dict()
    for name in writer.names:
        scratch = state[name].clone()
        writer.add(name, scratch)
        scratch.zero_()  # as a gathered parameter, whose memory serves the next one
    writer.finish(TOKENIZER)
    loaded = load_folder(tmp_path, dtype=None).model.state_dict()
    assert all(torch.equal(loaded[name], state[name].bfloat16()) for name in state)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_that_stay_are_written_from_where_they_are(tmp_path: Path) -> None:
    """Whatever they share: a whole block of memory twice, and parts of one that overlap."""
    whole, base = torch.randn(4, 3), torch.randn(12)
    tensors = {"a": whole, "b": whole, "c": base[:8], "d": base[4:], "e": torch.randn(3, 5).T}
    places = {name: Place("x.safetensors", name) for name in tensors}
    writer = SafetensorsWriter(tmp_path, specs_in(tensors), places)
    for name, tensor in tensors.items():
        writer.add(name, tensor, stays=True)
    writer.finish()
    written = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
