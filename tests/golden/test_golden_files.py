"""The reading of golden files itself: kinds, and the skip where the folder is absent."""

from pathlib import Path

import pytest
import torch
from golden_files import Golden, golden_files, kind_of
from safetensors.torch import save_file


def write_golden(folder: Path, name: str) -> None:
    weight = torch.tensor([0.5, -2.0], dtype=torch.float16)
    save_file({"param.w": weight, "out.y": torch.ones(3)}, folder / name, {"config": '{"ch": 32}'})


def test_longest_kind_wins() -> None:
    assert kind_of("tokenizer_gan_d16.safetensors") == "tokenizer_gan_"
    assert kind_of("tokenizer_d16.safetensors") == "tokenizer_"
    assert kind_of("head_t2i_16x.safetensors") == "head_t2i_"
    assert kind_of("README.md") is None


def test_every_file_of_a_kind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer_a", "tokenizer_gan_b", "tokenizer_c", "t2i_d"):
        write_golden(tmp_path, f"{name}.safetensors")
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    found = [param.values[0] for param in golden_files("tokenizer_")]
    assert [golden.path.stem for golden in found] == ["tokenizer_a", "tokenizer_c"]
    golden: Golden = found[0]
    assert golden.config == {"ch": 32}
    assert golden.group("param.")["w"].dtype == torch.float32
    assert golden.group("param.")["w"].tolist() == [0.5, -2.0]


def test_absent_folder_skips_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path / "nowhere"))
    (param,) = golden_files("c2i_")
    assert param.marks[0].name == "skip"
    assert "GOLDEN_DIR" in param.marks[0].kwargs["reason"]


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        golden_files("tokenisers_")
