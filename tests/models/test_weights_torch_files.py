"""Published `.pt` files: class-conditional models and tokenizers, whose sizes are read off their tensors."""

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models as cases
import torch

from models.class_conditional import CLASS_CONDITIONAL_PRESETS, ClassConditionalModel
from models.tensor_files.strict import specs_of
from models.tokenizer import BinaryTokenizer, TokenizerConfig, load_tokenizer
from models.weights.class_conditional import (
    infer_class_conditional_config,
    load_class_conditional,
    save_class_conditional,
)
from models.weights.kinds import open_weights, write_file, write_folder
from models.weights.tokenizer_weights import infer_tokenizer_config


def published(model: torch.nn.Module, tokenizer: BinaryTokenizer | None) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if tokenizer is not None:
        state |= {f"vae.{name}": value for name, value in tokenizer.state_dict().items()}
    return state


@pytest.mark.parametrize("parallel_num", [1, 4, 16])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_class_conditional_file_and_back(tmp_path: Path, parallel_num: int, with_tokenizer: bool) -> None:
    model = cases.class_conditional(parallel_num)
    tokenizer = cases.binary_tokenizer() if with_tokenizer else None
    other = {name: value + 1 for name, value in model.state_dict().items()}
    ema = published(model, tokenizer)
    torch.save({"model": other, "ema": ema, "epoch": 800, "args": {"lr": 6e-4}}, tmp_path / "b.pt")
    weights = open_weights(tmp_path / "b.pt")
    assert weights.config.to_json() == {**model.config.to_json(), "perturb_rate": 0.1}

    write_folder(weights, (tmp_path / "ours"))
    cases.assert_same(load_class_conditional(tmp_path / "ours"), model)
    assert (tmp_path / "ours" / "ae.safetensors").exists() == with_tokenizer
    if tokenizer is not None:
        cases.assert_same(load_tokenizer(tmp_path / "ours"), tokenizer)

    out = io.BytesIO()
    write_file(open_weights(tmp_path / "ours"), out)
    out.seek(0)
    again = torch.load(out, weights_only=True)
    assert again["class_conditional_config"] == weights.config.to_json()
    assert list(again) == ["ema", "class_conditional_config"]
    assert again["ema"].keys() == ema.keys()
    assert all(torch.equal(again["ema"][name], ema[name]) for name in ema)


def test_without_an_average_the_model_is_taken(tmp_path: Path) -> None:
    model = cases.class_conditional()
    torch.save({"model": model.state_dict()}, tmp_path / "b.pt")
    write_folder(open_weights(tmp_path / "b.pt"), tmp_path / "ours")
    cases.assert_same(load_class_conditional(tmp_path / "ours"), model)


def test_an_average_without_the_frozen_tokenizer_takes_the_models(tmp_path: Path) -> None:
    model, tokenizer = cases.class_conditional(), cases.binary_tokenizer()
    torch.save({"model": published(model, tokenizer), "ema": published(model, None)}, tmp_path / "b.pt")
    write_folder(open_weights(tmp_path / "b.pt"), tmp_path / "ours")
    cases.assert_same(load_tokenizer(tmp_path / "ours"), tokenizer)


def test_a_checkpoint_of_the_published_trainer_is_refused_with_the_line_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its command line beside the weights: an object, which no file may bring along."""
    model = cases.class_conditional()
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 6e-4}]}
    state = {"ema": model.state_dict(), "model": model.state_dict(), "optimizer": optimizer}
    torch.save({**state, "args": argparse.Namespace(lr=6e-4)}, tmp_path / "0800.pt")
    with pytest.raises(ValueError, match=r"tensors and plain values \(argparse\.Namespace\)") as caught:
        open_weights(tmp_path / "0800.pt")
    message = str(caught.value)
    assert len(message) < 520 + len(str(tmp_path))
    assert "add_safe_globals" not in message
    monkeypatch.chdir(tmp_path)
    exec(message.rpartition("import again.pt: ")[2], {})  # the advice works
    assert list(torch.load(tmp_path / "again.pt", weights_only=True)) == ["ema", "model"]
    write_folder(open_weights(tmp_path / "again.pt"), tmp_path / "ours")
    cases.assert_same(load_class_conditional(tmp_path / "ours"), model)


def test_faults_of_a_class_conditional_file_are_listed(tmp_path: Path) -> None:
    state = published(cases.class_conditional(), None)
    del state["layers.1.attention.wo.weight"]
    state["query_token"] = torch.zeros(1, 15, 128)
    state["surprise"] = torch.zeros(1)
    state["head.net.res_blocks.1.w2.weight"] = torch.zeros(128, 7)
    torch.save({"model": state}, tmp_path / "b.pt")
    with pytest.raises(ValueError) as caught:
        open_weights(tmp_path / "b.pt")
    message = str(caught.value)
    assert "b.pt, model" in message
    assert "layers.1.attention.wo.weight [128, 128] (class_conditional_config.json: n_layer = 2" in message
    assert "1 unexpected:\n  surprise [1]" in message
    assert "head.net.res_blocks.1.w2.weight is [128, 7], expected [128, 192]" in message
    del state["norm.weight"]
    state["pos_for_diff.weight"] = torch.zeros(4)
    torch.save({"model": state}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="not the weights of a class-conditional model") as caught:
        open_weights(tmp_path / "b.pt")
    assert "\n- norm.weight is missing, expected [dim]\n" in str(caught.value)
    assert str(caught.value).endswith(
        "\n- pos_for_diff.weight is [4], expected [(resolution / down_size)^2, dim]"
    )


@pytest.mark.parametrize("name", list(CLASS_CONDITIONAL_PRESETS))
def test_every_published_size_is_recognized(name: str) -> None:
    config = CLASS_CONDITIONAL_PRESETS[name]
    specs = specs_of(lambda: ClassConditionalModel(config))
    inferred = infer_class_conditional_config(specs, config.down_size, name)
    assert inferred.to_json() == config.to_json()


@pytest.mark.parametrize("name", ["B-4x", "L-1x", "H-16x"])
def test_a_geometry_that_tensors_do_not_tell_survives(tmp_path: Path, name: str) -> None:
    """The shape of a published model in small, with heads and settings that no tensor shows."""
    published_size = CLASS_CONDITIONAL_PRESETS[name]
    config = replace(
        published_size,
        dim=published_size.dim // 16 // 16 * 16,
        n_layer=2,
        n_head=published_size.n_head // 4,
        diff_layers=published_size.diff_layers // 2,
        diff_dim=64,
        diff_adanln_layers=1,
        resolution=64,
        cls_token_num=2,
        num_classes=5,
        mask="causal",
        P_mean=-0.3,
        diff_batch_mul=2,
    )
    model = cases.randomized(ClassConditionalModel(config))
    tokenizer = cases.tokenizer_folder(tmp_path / "ae")
    save_class_conditional(model, tmp_path / "ours", tokenizer)
    with (tmp_path / "out.pt").open("wb") as file:
        write_file(open_weights(tmp_path / "ours"), file)
    again = open_weights(tmp_path / "out.pt")
    assert again.config == config
    with pytest.raises(
        ValueError, match=f"99 heads are asked for, but its configuration says {config.n_head}"
    ):
        open_weights(tmp_path / "out.pt", heads=99)
    write_folder(again, tmp_path / "back")
    assert (tmp_path / "back" / "class_conditional_config.json").read_bytes() == (
        tmp_path / "ours" / "class_conditional_config.json"
    ).read_bytes()
    cases.assert_same(load_class_conditional(tmp_path / "back"), model)


def test_heads_that_no_file_tells_are_asked_for(tmp_path: Path) -> None:
    config = replace(cases.class_conditional().config, dim=96, n_head=4)
    torch.save({"ema": ClassConditionalModel(config).state_dict()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"96 wide, which heads of 64 .* do not divide.* give their number"):
        open_weights(tmp_path / "b.pt")
    assert open_weights(tmp_path / "b.pt", heads=4).config.n_head == 4
    with pytest.raises(ValueError, match="dim is 96 with n_head 7"):
        open_weights(tmp_path / "b.pt", heads=7)
    torch.save({"state_dict": cases.binary_tokenizer().state_dict()}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="has no number of heads"):
        open_weights(tmp_path / "ae.pt", heads=4)
    with pytest.raises(ValueError, match="a folder tells its number of heads"):
        open_weights(cases.tokenizer_folder(tmp_path / "ae"), heads=4)


def test_a_recorded_configuration_is_checked(tmp_path: Path) -> None:
    model = cases.class_conditional()
    for recorded, message in (
        (["B"], "describes no class-conditional model"),
        ({**model.config.to_json(), "layers": 3}, "unknown keys"),
        ({**model.config.to_json(), "n_layer": 3}, "n_layer = 3"),
    ):
        content = {"ema": model.state_dict(), "class_conditional_config": recorded}
        torch.save(content, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=message):
            open_weights(tmp_path / "b.pt")


def test_our_own_class_conditional_folder(tmp_path: Path) -> None:
    model = cases.class_conditional().to(torch.bfloat16)
    save_class_conditional(model, tmp_path / "a", cases.tokenizer_folder(tmp_path / "ae"))
    cases.assert_same(load_class_conditional(tmp_path / "a", dtype=None), model)
    path = tmp_path / "a" / "class_conditional_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "n_layer": 3}))
    with pytest.raises(ValueError, match="n_layer = 3"):
        load_class_conditional(tmp_path / "a")
    path.write_text(json.dumps({**data, "layers": 3}))
    with pytest.raises(ValueError, match="unknown keys"):
        load_class_conditional(tmp_path / "a")
    path.unlink()
    with pytest.raises(ValueError, match="not a configuration of a class-conditional model"):
        load_class_conditional(tmp_path / "a")


@pytest.mark.parametrize("gan", [False, True])
def test_a_tokenizer_file_and_back(tmp_path: Path, gan: bool) -> None:
    tokenizer = cases.binary_tokenizer(gan)
    training_only = {
        "discriminator.main.0.num_batches_tracked": torch.tensor(7),
        "loss.lpips.weight": torch.zeros(3),
        "quantize.codebook": torch.zeros(2, dtype=torch.int64),
    }
    content = {
        "state_dict": {**training_only, **tokenizer.state_dict()},
        "epoch": 3,
        "optimizer_states": [{}],
    }
    torch.save(content, tmp_path / "ae_d16c32.pt")
    weights = open_weights(tmp_path / "ae_d16c32.pt")
    write_folder(weights, tmp_path / "ours")
    loaded = load_tokenizer(tmp_path / "ours")
    assert loaded.config == tokenizer.config
    cases.assert_same(loaded, tokenizer)
    out = io.BytesIO()
    write_file(open_weights(tmp_path / "ours"), out)
    out.seek(0)
    again = torch.load(out, weights_only=True)["state_dict"]
    assert again.keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("factors", [(1, 1, 2, 2, 4), (1, 1, 1, 2, 2, 4), (1,), (2, 4)])
@pytest.mark.parametrize("gan", [False, True])
def test_the_sizes_of_a_tokenizer_are_read_off_its_tensors(factors: tuple[int, ...], gan: bool) -> None:
    config = TokenizerConfig(ch=64, ch_mult=factors, z_channels=48, num_res_blocks=3, gan_decoder=gan)
    assert infer_tokenizer_config(specs_of(lambda: BinaryTokenizer(config)), "here") == config


def test_faults_of_a_tokenizer_file_are_listed(tmp_path: Path) -> None:
    state = dict(cases.binary_tokenizer().state_dict())
    del state["decoder.mid_block.0.conv1.weight"]
    state["decoder.adaptive.0.gamma.weight"] = torch.zeros(5, 5)
    torch.save({"state_dict": state}, tmp_path / "ae.pt")
    with pytest.raises(ValueError) as caught:
        open_weights(tmp_path / "ae.pt")
    message = str(caught.value)
    assert "1 missing:\n  decoder.mid_block.0.conv1.weight [64, 64, 3, 3] (ae_config.json: ch = 32" in message
    assert "decoder.adaptive.0.gamma.weight is [5, 5], expected [32, 32]" in message
    torch.save({"state_dict": {"discriminator.w": torch.zeros(1)}}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="not the weights of a binary tokenizer") as caught:
        open_weights(tmp_path / "ae.pt")
    assert "\n- encoder.conv_in.weight is missing, expected [ch, in_channels, 3, 3]\n" in str(caught.value)


def test_a_file_of_another_kind_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"generator": {}, "step": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds \['generator', 'step'\]; expected `ema` or `model`"):
        open_weights(tmp_path / "x.pt")
