"""A start that finds everything done answers at once: it imports nothing that takes seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_pipeline.recipe_folder import recipe_record
from evaluation.compare import compare, identity_of, refuse_foreign
from evaluation.picture_files import picture_name, picture_settings, source_of, write_picture
from evaluation.recipes import CompareRecipe, Sampling
from foundation.errors import DataError
from foundation.ownership import FolderTaken
from foundation.recipes import load_recipe
from trainer.tokenizer_training.recipe import TokenizerRecipe

HEAVY = {"torch", "transformers", "deepspeed", "streaming", "duckdb"}
REPOSITORY = Path(__file__).resolve().parents[2]
COMPARE = REPOSITORY / "configs/quickstart/compare.yaml"


def start(cwd: Path, *arguments: str) -> tuple[str, set[str]]:
    """What a command prints, and which of the heavy modules it has imported."""
    program = (
        "import sys, bitdance\n"
        "try: bitdance.app(sys.argv[1:], prog_name='bitdance')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules)\n"
    )
    command = [sys.executable, "-P", "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    *said, modules = done.stdout.splitlines()
    return "\n".join(said), HEAVY & set(modules.split())


def test_generate(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    made_with = picture_settings(
        "a cat", (64, 64), Sampling(), 1, source_of(tmp_path / "model", None, None, None)
    )
    path = tmp_path / "samples" / picture_name("a cat", 0, 0)
    write_picture(path, Image.new("RGB", (64, 64)), made_with)
    said, heavy = start(tmp_path, "generate", str(tmp_path / "model"), "-p", "a cat", "--size", "64x64")
    assert "nothing to do" in said and not heavy


@pytest.fixture
def compared(tmp_path: Path, monkeypatch) -> CompareRecipe:
    """The quickstart's comparison, in a folder that has the files which it depends on."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(CompareRecipe, COMPARE)
    for path in inputs_of(recipe):
        path.parent.mkdir(parents=True)
        path.write_bytes(str(path).encode())
    recipe.output.mkdir()
    return recipe


def inputs_of(recipe: CompareRecipe) -> list[Path]:
    weights = [recipe.tokenizer / "ae.safetensors", *(m.folder / "model.safetensors" for m in recipe.models)]
    return [recipe.latents / "manifest.json", *weights]


def test_compare(compared: CompareRecipe) -> None:
    (compared.output / "comparison.json").write_text(json.dumps({"identity": identity_of(compared)}))
    said, heavy = start(Path.cwd(), "compare", str(COMPARE))
    assert "nothing to do" in said and not heavy


def test_a_damaged_comparison_is_named(compared: CompareRecipe) -> None:
    (compared.output / "comparison.json").write_text('{"identity": ')
    with pytest.raises(DataError, match=r"comparison\.json is damaged .*line 1, column 14\): delete it"):
        compare(compared)


def test_a_comparison_is_written_beside_nothing_else(tmp_path: Path) -> None:
    refuse_foreign(tmp_path / "absent")
    (tmp_path / "grid.png").touch()
    refuse_foreign(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(FolderTaken, match=r"holds 'manifest\.json'"):
        refuse_foreign(tmp_path)


def test_other_weights_are_compared_anew(compared: CompareRecipe) -> None:
    before = identity_of(compared)
    for path in inputs_of(compared):
        content = path.read_bytes()
        path.write_bytes(b"new")
        assert identity_of(compared) != before
        path.write_bytes(content)
        assert identity_of(compared) == before


def test_tokenizer_train(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = yaml.safe_load((REPOSITORY / "configs/quickstart/tokenizer.yaml").read_text())
    path.write_text(yaml.safe_dump(values | {"output": str(tmp_path / "tokenizer")}))
    recipe = load_recipe(TokenizerRecipe, path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "recipe.json").write_text(recipe_record(recipe))
    (tmp_path / "tokenizer" / "ae_config.json").write_text("{}")
    said, heavy = start(tmp_path, "tokenizer", "train", str(path))
    assert "trained already" in said and not heavy
