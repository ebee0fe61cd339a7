"""Weights come from strangers: nothing in them is run, and no path leads out of their folder."""

import json
import pickle
from pathlib import Path

import pytest
import tiny_models as cases
import torch
from safetensors.torch import load_file

from models.weights import FolderWriter, locate, open_folder, stored_specs
from models.weights.kinds import open_weights
from models.weights.torch_files import read_torch_file

TOKENIZER = cases.text_tokenizer(4)


class Payload:
    """What an attacker pickles: reading it back would create a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["ema", "extra"])
def test_a_pickle_payload_is_refused_and_not_run(tmp_path: Path, zipped: bool, key: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / "model.pt"
    content = {"model": {"w": torch.zeros(2)}, key: Payload(witness)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt: ") as caught:
        open_weights(path)
    assert not witness.exists()
    if zipped:
        assert "refused" in str(caught.value)
        assert "pathlib.Path.touch" in str(caught.value) or "getattr" in str(caught.value)
    # The payload is real: unpickling without care runs it.
    pickle.loads(pickle.dumps(Payload(witness)))  # noqa: S301
    assert witness.exists()


def test_files_that_are_not_torch_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=r"model\.pt: not a whole file of torch\.save .*; fetch it again$"):
        read_torch_file(path)
    torch.save({"ema": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a whole file"):
        read_torch_file(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list; expected a dictionary"):
        read_torch_file(path)
    with pytest.raises(ValueError, match="no such file"):
        read_torch_file(tmp_path / "absent.pt")


def test_the_old_form_of_torch_save_tells_how_to_renew_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "model.pt", {"ema": {"w": torch.arange(3.0)}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6") as caught:
        read_torch_file(path)
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).rpartition(": ")[2], {"torch": torch})  # the advice works
    assert torch.equal(read_torch_file(Path("again.pt"))["ema"]["w"], content["ema"]["w"])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("text", "str"),
        (3, "int"),
        (torch.zeros(2, dtype=torch.int64), "torch.int64"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.zeros(2, device="meta"), "torch.float32, without values"),
        (torch.eye(2).to_sparse(), "torch.float32, torch.sparse_coo"),
        ([1.0], "list"),
    ],
)
def test_what_is_no_weight_among_the_weights_is_named(tmp_path: Path, value: object, kind: str) -> None:
    torch.save({"ema": {"norm.weight": torch.ones(2), "odd": value}}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError,
        match=rf"model\.pt, ema: expected dense float tensors only \(F64, F32, F16, BF16\), found 'odd' "
        rf"\({kind}",
    ):
        open_weights(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "a" * 5000 + ".safetensors",
        7,
        None,
    ],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    folder = sharded(tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes((folder / "projector.safetensors").read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: (names the file|not a readable index)"):
        open_folder(folder)


def test_an_index_that_names_an_absent_or_other_file_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    held = list(load_file(shard))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is not there"):
        open_folder(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in held:
        index["weight_map"][name] = "pytorch_model.bin"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected safetensors files only"):
        open_folder(folder)
    for text in ("[]", '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: not a readable index"):
            open_folder(folder)


def test_a_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"stands in {first.name} and in {second.name}"):
        open_folder(folder)


@pytest.mark.parametrize("source", ["hf:", "hf:owner", "hf:owner/../..", "hf:owner/name/code.py", "hf:a b/c"])
def test_malformed_hub_names_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match="expected hf:owner/name"):
        locate(source)


def test_without_the_hub_there_is_a_clear_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in ("hf:owner/name", "hf:owner/name/model.pt"):
        with pytest.raises(
            ValueError, match=f"{source}: cannot be fetched from the Hugging Face hub"
        ) as caught:
            locate(source)
        assert "copy the folder to this machine" in str(caught.value)


def test_only_weights_and_configs_are_fetched_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate("hf:owner/name") == tmp_path
    ((repository, patterns),) = asked
    assert repository == "owner/name"
    assert not any(pattern in ("*", "*.py", "*.bin", "*.pt", "*.pkl") for pattern in patterns)


def test_a_tokenizer_is_fetched_from_the_hub_with_its_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert locate("hf:owner/name/ae_d16c32.safetensors") == tmp_path / "ae_d16c32.safetensors"
    assert asked == [
        ("owner/name", "ae_d16c32_config.json"),
        ("owner/name", "ae_d16c32.safetensors"),
    ]


def sharded(folder: Path) -> Path:
    model = cases.text_to_image(len(TOKENIZER))
    writer = FolderWriter(folder, model.config, stored_specs(model), shard_bytes=40_000)
    for name in writer.names:
        writer.add(name, model.state_dict()[name])
    writer.finish(TOKENIZER)
    return folder
