"""The published text-to-image folder: bit-exact round trips, strict reading, and plain transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models as cases
import torch
from safetensors.torch import load_file, save_file
from small_folder import ROWS, TOKENIZER, edit, saved

from models.tensor_files.safetensors_files import Place, SafetensorsWriter
from models.tensor_files.strict import specs_in
from models.weights import (
    FolderWriter,
    load_folder,
    open_folder,
    read_folder_config,
    save_folder,
    stored_specs,
    write_source,
)


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
