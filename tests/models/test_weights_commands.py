"""`bitdance import` and `bitdance export`, as a user runs them."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as cases
import torch
from typer.testing import CliRunner, Result

from evaluation import weights_cli
from evaluation.weights_cli import app
from foundation.errors import DataError, RecipeError, UserError
from models.tokenizer import load_tokenizer
from models.weights import load_folder, save_folder
from models.weights.class_conditional import load_class_conditional, save_class_conditional

TOKENIZER = cases.text_tokenizer(4)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, (SystemExit, UserError)):
        raise result.exception
    return result


def failure(*arguments: object) -> UserError:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    return error


def test_a_text_to_image_folder_in_grown_and_out(tmp_path: Path) -> None:
    model = cases.text_to_image(len(TOKENIZER))
    save_folder(model, TOKENIZER, tmp_path / "published", cases.tokenizer_folder(tmp_path / "ae"))
    result = run("import", tmp_path / "published", tmp_path / "ours")
    assert result.exit_code == 0
    assert (
        "text-to-image model: 0.6M parameters, p = 4, 32 bits per token, with its tokenizer" in result.output
    )
    assert f"written to {tmp_path / 'ours'}" in result.output
    assert run("export", tmp_path / "ours", tmp_path / "out").exit_code == 0
    cases.assert_same(load_folder(tmp_path / "out").model, model)
    cases.assert_same(load_tokenizer(tmp_path / "out"), load_tokenizer(tmp_path / "ae"))

    grown = run("import", tmp_path / "ours", tmp_path / "p8", "--patch", 8, "--seed", 5)
    assert grown.exit_code == 0 and "published size" not in grown.output
    cases.assert_same(load_folder(tmp_path / "p8").model, load_folder(tmp_path / "ours", p=8, seed=5).model)
    unusual = run("import", tmp_path / "ours", tmp_path / "p6", "--patch", 6)
    assert "--patch 6: sides in multiples of 96 px, unlike those of any published size" in unusual.output
    assert {path.name for path in tmp_path.iterdir()} == {"published", "ae", "ours", "out", "p8", "p6"}


def test_an_export_takes_its_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, tmp_path / "ours")
    error = failure("export", tmp_path / "ours", tmp_path / "out")
    assert "came without its binary tokenizer" in str(error)
    folder = cases.tokenizer_folder(tmp_path / "ae")
    assert run("export", tmp_path / "ours", tmp_path / "out", "--tokenizer", folder).exit_code == 0
    assert load_folder(tmp_path / "out").tokenizer_folder == tmp_path / "out"


def test_pt_files_in_and_out(tmp_path: Path) -> None:
    model, tokenizer = cases.class_conditional(), cases.binary_tokenizer()
    state = dict(model.state_dict()) | {f"vae.{k}": v for k, v in tokenizer.state_dict().items()}
    torch.save({"ema": state}, tmp_path / "b.pt")
    torch.save({"state_dict": tokenizer.state_dict()}, tmp_path / "ae.pt")
    assert run("import", tmp_path / "b.pt", tmp_path / "b").exit_code == 0
    assert run("import", tmp_path / "ae.pt", tmp_path / "ae").exit_code == 0
    cases.assert_same(load_class_conditional(tmp_path / "b"), model)
    cases.assert_same(load_tokenizer(tmp_path / "ae"), tokenizer)
    assert run("export", tmp_path / "b", tmp_path / "again.pt").exit_code == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)["ema"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    error = failure("export", tmp_path / "ae", tmp_path / "ae.pth")
    assert "ae.pth: expected a name that ends in .pt, which is the published form of" in str(error)


def test_a_tokenizer_published_as_safetensors(tmp_path: Path) -> None:
    """`NAME.safetensors` with `NAME_config.json` beside it, and others of the kind in the same folder."""
    for name, bits in (("ae_d16c32", 32), ("ae_d16c16", 16)):
        folder = cases.tokenizer_folder(tmp_path / "made", bits)
        (folder / "ae.safetensors").rename(tmp_path / f"{name}.safetensors")
        (folder / "ae_config.json").rename(tmp_path / f"{name}_config.json")
    assert run("import", tmp_path / "ae_d16c32.safetensors", tmp_path / "ours").exit_code == 0
    cases.assert_same(load_tokenizer(tmp_path / "ours"), cases.binary_tokenizer())


def test_class_conditional_weights_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor read moves the import on, every 16 MiB (here: KiB) written the export."""
    monkeypatch.setattr("foundation.progress.PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr("evaluation.weights_cli.TICK", 1 << 10)
    save_class_conditional(cases.class_conditional(), tmp_path / "a", cases.tokenizer_folder(tmp_path / "ae"))
    exported = run("export", tmp_path / "a", tmp_path / "b.pt").output
    ticks = re.findall(r"writing, in 16 MiB: (\d+)/(\d+)", exported)
    size = (tmp_path / "b.pt").stat().st_size
    assert len(ticks) > 100 and 0.95 * size < int(ticks[-1][1]) << 10 < size
    assert int(ticks[-1][0]) >= int(ticks[-1][1]) - 1
    count = len(cases.class_conditional().state_dict())
    imported = run("import", tmp_path / "b.pt", tmp_path / "c").output
    assert re.findall(r"weights: (\d+)/(\d+)", imported) == [
        (str(n), str(count)) for n in range(1, count + 1)
    ]


def test_a_published_pt_has_its_tokenizer(tmp_path: Path) -> None:
    """A class-conditional model trained here comes without one: it is named, and of the model's bits."""
    model, tokenizer = cases.class_conditional(), cases.tokenizer_folder(tmp_path / "ae")
    save_class_conditional(model, tmp_path / "ours")
    assert "came without its binary tokenizer" in str(failure("export", tmp_path / "ours", tmp_path / "b.pt"))
    wrong = cases.tokenizer_folder(tmp_path / "wrong", bits=16)
    error = failure("export", tmp_path / "ours", tmp_path / "b.pt", "--tokenizer", wrong)
    assert "16 bits a token, but the model has latent_dim = 32" in str(error)
    assert not (tmp_path / "b.pt").exists()
    assert run("export", tmp_path / "ours", tmp_path / "b.pt", "--tokenizer", tokenizer).exit_code == 0
    state = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    frozen = {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    expected = load_tokenizer(tokenizer).state_dict()
    assert frozen.keys() == expected.keys()
    assert all(torch.equal(frozen[name], value) for name, value in expected.items())


def test_mistakes_end_in_one_message_and_leave_nothing(tmp_path: Path) -> None:
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 32}))
    whole = tmp_path / "whole"
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, whole)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty" / "export").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    torch.save({"ema": {"x": 1}}, tmp_path / "bad.pt")
    torch.save({"state_dict": cases.binary_tokenizer().state_dict()}, tmp_path / "ae.pt")
    before = set(tmp_path.rglob("*"))
    new = tmp_path / "new"
    for arguments, error, message in [
        (("import", tmp_path / "nowhere", new), DataError, "nowhere: no such file or folder"),
        (("import", "hf:nonsense", new), DataError, "expected hf:owner/name"),
        (
            ("import", tmp_path / "ours", new),
            DataError,
            "ch_cond is 64, expected the backbone's hidden_size 32",
        ),
        (("import", tmp_path / "empty", new), DataError, f"name {tmp_path / 'empty' / 'export'}"),
        (("import", tmp_path / "bad.pt", new), DataError, "'x' (int)"),
        (("import", tmp_path / "ours" / "projector.safetensors", new), DataError, "expected its folder"),
        (("import", tmp_path / "ours" / "vision_head.safetensors", new), DataError, "expected its folder"),
        (("import", tmp_path / "ae.pt", new, "--patch", "8"), RecipeError, "--patch is for text-to-image"),
        (("import", whole, new, "--patch", "4"), RecipeError, "patches of 4x4 tokens; expected a p larger"),
        (("import", whole, new, "--patch", "-1"), RecipeError, "at most 256, not -1"),
        (("import", whole, new, "--patch", "300"), RecipeError, "at most 256, not 300"),
        (("import", whole, new, "--heads", "2"), RecipeError, "a folder tells its number of heads"),
        (("import", tmp_path / "ae.pt", new, "--heads", "2"), RecipeError, "so it has no number of heads"),
        (("import", tmp_path / "ae.pt", tmp_path / "full"), RecipeError, "full exists already"),
        (("import", tmp_path / "ae.pt", tmp_path / "dangling"), RecipeError, "dangling exists already"),
        (("export", tmp_path / "nowhere", new), DataError, "nowhere: no such file or folder"),
    ]:
        caught = failure(*arguments)
        assert type(caught) is error
        assert message in str(caught)
    assert set(tmp_path.rglob("*")) == before


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, tmp_path / "ours")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", full)
    assert "No space left" in str(failure("import", tmp_path / "ours", tmp_path / "new"))
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_two_writers_to_one_place_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export begins and ends in the middle of an import: its folder is whole, the import is refused."""
    model = cases.text_to_image(len(TOKENIZER))
    save_folder(model, TOKENIZER, tmp_path / "ours", cases.tokenizer_folder(tmp_path / "ae"))
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "diary.txt").write_text("somebody's own")
    (tmp_path / ".new.elsewhere.1.01234567.partial").mkdir()  # another host's, under way
    before = set(tmp_path.rglob("*"))
    shown, results = weights_cli._shown, []

    def with_another(tensors: Iterable[Any], total: int) -> Iterator[Any]:
        for index, tensor in enumerate(shown(tensors, total)):
            if index == total // 2:
                monkeypatch.setattr(weights_cli, "_shown", shown)
                results.append(run("export", tmp_path / "ours", tmp_path / "new").exit_code)
            yield tensor

    monkeypatch.setattr(weights_cli, "_shown", with_another)
    assert "new exists already" in str(failure("import", tmp_path / "ours", tmp_path / "new"))
    assert results == [0]
    cases.assert_same(load_folder(tmp_path / "new").model, model)
    cases.assert_same(load_tokenizer(tmp_path / "new"), load_tokenizer(tmp_path / "ae"))
    after = {path for path in tmp_path.rglob("*") if tmp_path / "new" not in (path, *path.parents)}
    assert after == before
