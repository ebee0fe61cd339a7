"""The figures and the grid of `bitdance compare`, from photos, latents and a model of random weights."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny_models as cases
from PIL import Image
from small_stage import make_inputs
from typer.testing import CliRunner

from bitdance import app
from data_pipeline.latents import LatentDataset
from evaluation.comparison import make_comparison
from evaluation.generate import PictureGenerator
from evaluation.recipes import ComparedModel, CompareRecipe, Sampling
from foundation.errors import DataError, RecipeError
from foundation.recipes import resolved_yaml
from models.weights import save_folder

BITS, GRID, SIDE, SAMPLES = 8, 8, 128, 3
COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents, their tokenizer, a model, and the photos as a shard: a color for each of three samples."""
    folder = tmp_path_factory.mktemp("comparison")
    make_inputs(folder, BITS)
    text_tokenizer = cases.text_tokenizer(4)
    model = cases.text_to_image(len(text_tokenizer), bits=BITS)
    save_folder(model, text_tokenizer, folder / "model", folder / "tokenizer")
    pictures = {f"128-{number}": encoded(color) for number, color in enumerate(COLORS)}
    write_shard(folder / "photos" / "00000.tar", pictures | {"not-in-the-latents": b"no picture"})
    return folder


def encoded(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), color).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, pictures: dict[str, bytes]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for key, content in pictures.items():
            for name, data in ((f"{key}.png", content), (f"{key}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def recipe_of(inputs: Path, output: Path, photos: Path | None = None, **changes: Path) -> CompareRecipe:
    values = {
        "latents": inputs / "latents",
        "photos": {"path": [f"{photos or inputs / 'photos'}/*.tar"]},
        "resolution": 128,
        "samples": SAMPLES,
        "tokenizer": inputs / "tokenizer",
        "models": [ComparedModel(label="a model", folder=inputs / "model")],
        "sampling": Sampling(steps=2, guidance=1.5, seed=5),
        "output": output,
    }
    return CompareRecipe.model_validate(values | changes)


def stored_bits(number: int) -> list[list[list[int]]]:
    """The latents of sample ``number`` as they were drawn: channels of rows of columns."""
    drawn = np.random.default_rng([SIDE, number]).integers(0, 2, (GRID * GRID, BITS)) * 2 - 1
    return [
        [[int(drawn[row * GRID + column, c]) for column in range(GRID)] for row in range(GRID)]
        for c in range(BITS)
    ]


def test_agreement_is_the_share_of_equal_bits(inputs: Path, tmp_path: Path) -> None:
    recipe = recipe_of(inputs, tmp_path)
    make_comparison(recipe, {"recipe": "x"})
    found = json.loads((tmp_path / "comparison.json").read_text())
    generator = PictureGenerator(inputs / "model", inputs / "tokenizer")
    dataset = LatentDataset(str(inputs / "latents"))
    shares = []
    for number, sample in enumerate(found["samples"]):
        assert sample["key"] == f"128-{number}"
        caption = dataset.record(128, number).caption
        generated = generator.bits(caption, SIDE, SIDE, recipe.sampling)[0].tolist()
        stored = stored_bits(number)
        places = [(c, y, x) for c in range(BITS) for y in range(GRID) for x in range(GRID)]
        equal = sum(generated[c][y][x] == stored[c][y][x] for c, y, x in places)
        shares.append(equal / len(places))
        assert sample["bit_agreement"]["a model"] == pytest.approx(shares[-1])
    assert min(shares) > 0.3 and max(shares) < 0.7  # random weights: chance
    assert found["bit_agreement"]["a model"] == pytest.approx(sum(shares) / SAMPLES)
    assert found["psnr_lowest"] == min(sample["psnr"] for sample in found["samples"])
    assert found["identity"] == {"recipe": "x"}


def test_the_photos_stand_in_the_first_column(inputs: Path, tmp_path: Path) -> None:
    make_comparison(recipe_of(inputs, tmp_path), {})
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    tops = [np.argwhere((grid == color).all(-1)).min(0) for color in COLORS]
    assert len({int(left) for _, left in tops}) == 1
    assert [int(top) for top, _ in tops] == sorted(int(top) for top, _ in tops)


def test_damaged_and_missing_photos_are_told_together(inputs: Path, tmp_path: Path) -> None:
    torn = encoded(COLORS[0])[:60]
    write_shard(tmp_path / "photos" / "0.tar", {"128-0": torn, "128-1": encoded(COLORS[1])})
    with pytest.raises(DataError) as caught:
        make_comparison(recipe_of(inputs, tmp_path / "out", tmp_path / "photos"), {})
    message = str(caught.value)
    assert "photo '128-0' in" in message and "0.tar: cannot be decoded" in message
    assert "no photo '128-2'" in message and "128-1" not in message


def test_another_tokenizer_is_refused(inputs: Path, tmp_path: Path) -> None:
    other = cases.tokenizer_folder(tmp_path / "other", bits=BITS)
    with pytest.raises(RecipeError, match="is not the tokenizer that made"):
        make_comparison(recipe_of(inputs, tmp_path / "out", tokenizer=other), {})


def test_a_damaged_tokenizer_is_bad_data(inputs: Path, tmp_path: Path) -> None:
    """As the command ends, with the message of models/."""
    path = tmp_path / "ae" / "ae.safetensors"
    shutil.copytree(inputs / "tokenizer", path.parent)
    path.write_bytes(path.read_bytes()[:1000])
    recipe = recipe_of(inputs, tmp_path / "out", tokenizer=path.parent)
    (tmp_path / "compare.yaml").write_text(resolved_yaml(recipe))
    error = CliRunner().invoke(app, ["compare", str(tmp_path / "compare.yaml")]).exception
    assert isinstance(error, DataError) and f"{path}: not a whole safetensors file" in str(error)
