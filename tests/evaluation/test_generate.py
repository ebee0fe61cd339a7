"""A prompt becomes the sequence of training, and the bits the plain raster that the decoder reads."""

from pathlib import Path

import pytest
import tiny_models as cases
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from bitdance import app
from evaluation.generate import PictureGenerator
from evaluation.recipes import Sampling
from foundation.errors import RecipeError
from models.flow_settings import FlowSettings
from models.weights import save_folder

TOKENIZER = cases.text_tokenizer(4)
CAPTION = "a cat on a red sofa"
SAMPLING = Sampling(steps=2, guidance=2.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("generate")
    ae = cases.tokenizer_folder(place / "ae")
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, place / "model", ae)
    return place / "model"


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_the_model_is_asked_with_the_published_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts as they are written, special tokens and all: the user's turn, or none of it."""
    generator = PictureGenerator(folder)
    asked: list[object] = []
    draw = generator.model.generate
    monkeypatch.setattr(
        generator.model,
        "generate",
        lambda *args, **more: asked.append((args, more["flow"])) or draw(*args, **more),
    )
    generator.bits(CAPTION, 64, 128, SAMPLING)
    conditional = ids(f"<|im_start|>user\n{CAPTION}<|im_end|>\n<|im_start|>assistant\n")
    unconditional = ids("<|im_start|>assistant\n")
    assert asked == [((conditional, unconditional, 4, 8), FlowSettings(2.0, 2, "euler_maruyama"))]


def test_bits_are_in_plain_raster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come patch by patch, rows of 4x4 patches; each must end at its own row and column."""
    generator = PictureGenerator(folder)
    h, w, p = 8, 12, 4
    order = [
        (top + y, left + x)
        for top in range(0, h, p)
        for left in range(0, w, p)
        for y in range(p)
        for x in range(p)
    ]

    def numbered(*_: object, **__: object) -> Tensor:
        """Each token's channels 0 and 1 hold its row and its column."""
        tokens = torch.zeros(1, h * w, 32)
        tokens[0, :, :2] = torch.tensor(order, dtype=torch.float32)
        return tokens

    monkeypatch.setattr(generator.model, "generate", numbered)
    bits = generator.bits(CAPTION, h * 16, w * 16, SAMPLING)
    assert bits.shape == (1, 32, h, w)
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    assert torch.equal(bits[0, 0], rows.float()) and torch.equal(bits[0, 1], cols.float())


def test_a_seed_gives_a_picture(folder: Path) -> None:
    generator = PictureGenerator(folder)
    one, again = (generator.bits(CAPTION, 64, 64, SAMPLING, pictures=2) for _ in range(2))
    other = generator.bits(CAPTION, 64, 64, Sampling(steps=2, guidance=2.0, seed=4), pictures=2)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one[0], one[1])


def test_pictures_are_written_and_found_again(folder: Path, tmp_path: Path) -> None:
    command = [
        "generate",
        str(folder),
        "-p",
        CAPTION,
        "--size",
        "64x128",
        "--steps",
        "2",
        "-o",
        str(tmp_path),
    ]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    (path,) = tmp_path.iterdir()
    assert Image.open(path).size == (128, 64)
    assert "nothing to do" in CliRunner().invoke(app, command).output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-p", "", "--size", "64x64"], "a prompt is empty"),
        (["-p", " \n", "--size", "64x64"], "a prompt is empty"),
        (["--size", "60x64"], "60x64: sides of this model's pictures are multiples of 64 pixels"),
        (["--size", "80x64"], "80x64: sides of this model's pictures are multiples of 64 pixels"),
        (["-p", "cat " * 50_000, "--size", "64x64"], "exceed the context"),
    ],
)
def test_nothing_is_written_before_everything_fits(
    folder: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["generate", str(folder), "-p", CAPTION, *more, "-o", str(tmp_path)])
    assert isinstance(result.exception, RecipeError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "--device gpu: expected cpu, cuda"),
        (["--dtype", "float16"], "--dtype float16: expected"),
        (["--size", "big"], "--size big: expected HEIGHTxWIDTH"),
        (["--sampler", "heun"], "--sampler heun: expected"),
        (["-p", "a \udcff cat"], "--prompt number 2: is not UTF-8"),
    ],
)
def test_wrong_options_are_refused(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(folder), "-p", CAPTION, *options, "-o", str(tmp_path)])
    assert isinstance(result.exception, RecipeError) and message in str(result.exception)


def test_wrong_options_are_told_together(folder: Path, tmp_path: Path) -> None:
    options = ["--size", "256", "--sampler", "eulr", "--dtype", "float3", "--device", "cud"]
    result = CliRunner().invoke(app, ["generate", str(folder), "-p", CAPTION, *options, "-o", str(tmp_path)])
    assert "(4 problems)" in str(result.exception)


def test_a_tokenizer_of_other_bits_is_refused_before_sampling(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="16 bits per token, expected the model's 32"):
        PictureGenerator(folder, cases.tokenizer_folder(tmp_path, bits=16))


def test_a_broken_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    ae = cases.tokenizer_folder(tmp_path / "ae")
    path = ae / "ae.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    command = ["generate", str(folder), "-p", CAPTION, "--size", "64x64", "--tokenizer", str(ae)]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, RecipeError) and f"{path}: not a whole safetensors file" in str(
        result.exception
    )
    assert not result.stdout, "nothing is announced that is not done"
