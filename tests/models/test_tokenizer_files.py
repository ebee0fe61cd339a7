"""Files of a tokenizer: round trip, fingerprint, and weights that do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.tokenizer import (
    BinaryTokenizer,
    TokenizerConfig,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    tokenizer_from_state,
)

CONFIG = TokenizerConfig(ch=32, ch_mult=(1, 1), z_channels=4, num_res_blocks=1)


def make(seed: int = 0) -> BinaryTokenizer:
    torch.manual_seed(seed)
    return BinaryTokenizer(CONFIG)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.config == CONFIG
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_fingerprint_knows_weights_and_config_and_not_the_place(tmp_path: Path) -> None:
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path)
    print_of = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tmp_path) == print_of == tokenizer_fingerprint(load_tokenizer(tmp_path))
    with torch.no_grad():
        tokenizer.decoder.conv_out.bias[0] += 1e-6
    assert tokenizer_fingerprint(tokenizer) != print_of
    other = make()
    other.config = replace(CONFIG, gan_decoder=True)
    assert tokenizer_fingerprint(other) != print_of
    config = (tmp_path / "ae_config.json").read_text()
    (tmp_path / "ae_config.json").write_text(config.replace('"gan_decoder": false', '"gan_decoder": true'))
    with pytest.raises(
        ValueError, match=r"decoder\.conv_in\.weight is \[32, 4, 3, 3\], expected \[32, 8, 3, 3\]"
    ):
        tokenizer_fingerprint(tmp_path)


def test_half_precision_storage_is_widened(tmp_path: Path) -> None:
    tokenizer = make().half()
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).decoder.conv_out.weight.dtype == torch.float32
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(tokenizer.float())


def test_training_only_entries_are_passed_over() -> None:
    state = dict(make().state_dict()) | {"discriminator.main.0.weight": torch.zeros(2)}
    assert tokenizer_from_state(CONFIG, state).config == CONFIG


def test_every_misfit_is_listed(tmp_path: Path) -> None:
    save_tokenizer(make(), tmp_path)
    state = load_file(tmp_path / "ae.safetensors")
    del state["encoder.conv_in.weight"]
    state["encoder.mid.attn.q.weight"] = torch.zeros(3)
    state["decoder.conv_out.bias"] = torch.zeros(4)
    save_file(state, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"ae_config\.json") as caught:
        load_tokenizer(tmp_path)
    for part in (
        "1 missing:\n  encoder.conv_in.weight [32, 3, 3, 3] (ae_config.json: ch = 32, in_channels = 3)",
        "1 unexpected:\n  encoder.mid.attn.q.weight [3] (ae_config.json: ch = 32, ch_mult = [1, 1]",
        "1 misshapen:\n  decoder.conv_out.bias is [4], expected [3] (ae_config.json: out_ch = 3, ch = 32)",
    ):
        assert part in str(caught.value)


def test_absent_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ae_config\.json: no such file; expected that of a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "ae_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"ae_config\.json: not readable as JSON"):
        load_tokenizer(tmp_path)
    save_tokenizer(make(), tmp_path)
    (tmp_path / "ae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ae\.safetensors: no such file"):
        tokenizer_fingerprint(tmp_path)
