"""A prompt becomes the sequence of training, and the bits the plain raster that the decoder reads."""

import shutil
from pathlib import Path

import pytest
import tiny_models as cases
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from bitdance import app
from evaluation.generate import PictureGenerator
from evaluation.picture_files import picture_name, write_picture
from evaluation.recipes import Sampling
from foundation.errors import DataError, RecipeError
from models.flow_settings import FlowSettings
from models.weights import save_folder
from models.weights.class_conditional import save_class_conditional

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
    assert isinstance(result.exception, DataError) and f"{path}: not a whole safetensors file" in str(
        result.exception
    )
    assert not result.stdout, "nothing is announced that is not done"


def test_what_is_no_text_to_image_model_is_named(tmp_path: Path) -> None:
    """With the exit code of data, as `compare` and `import` end where a model is missing or damaged."""
    save_class_conditional(cases.class_conditional(), tmp_path / "classes")
    torch.save({"ema": cases.class_conditional().state_dict()}, tmp_path / "cc.pt")
    cases.tokenizer_folder(tmp_path / "ae")
    (tmp_path / "run" / "export").mkdir(parents=True)
    in_python = "models.class_conditional.sample draws"
    for name, messages in {
        "nope": ("nope: no such folder; expected an export of training",),
        "classes": ("is a class-conditional model: ", "`bitdance import`", in_python),
        "cc.pt": ("is a class-conditional model: ", "`bitdance import`", in_python),
        "ae": ("is a binary tokenizer: ", "painted by a text-to-image model"),
        "run": (f"name {tmp_path / 'run' / 'export'}",),
    }.items():
        command = ["generate", str(tmp_path / name), "-p", CAPTION, "-o", str(tmp_path / "out")]
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, DataError) and error.exit_code == 65
        assert all(message in str(error) for message in messages), str(error)


def test_damaged_weights_are_bad_data(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "vision_head.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    command = ["generate", str(tmp_path / "model"), "-p", CAPTION, "-o", str(tmp_path / "out")]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, DataError) and f"{path}: not a whole safetensors file" in str(error)


def test_a_file_of_the_user_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    """Whatever it is; pictures that were made here, with other settings, are made anew."""
    prompts = ("a cat", "a dog", "a cup")
    mine = [tmp_path / picture_name(prompt, 0, 0) for prompt in prompts]
    Image.new("RGB", (64, 64), "red").save(mine[0])
    mine[1].write_text("notes")
    write_picture(mine[2], Image.new("RGB", (64, 64)), {"made": "with other settings"})
    before = [path.read_bytes() for path in mine]
    options = ["--size", "64x64", "--steps", "1", "-o", str(tmp_path)]
    command = ["generate", str(folder), *options, *(word for prompt in prompts for word in ("-p", prompt))]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, RecipeError) and "(2 problems)" in str(error)
    assert str(mine[0]) in str(error) and str(mine[1]) in str(error) and str(mine[2]) not in str(error)
    assert [path.read_bytes() for path in mine] == before
    done = CliRunner().invoke(app, ["generate", str(folder), *options, "-p", prompts[2]])
    assert done.exit_code == 0 and mine[2].read_bytes() != before[2]


def test_requests_of_other_types_are_refused(folder: Path) -> None:
    generator = PictureGenerator(folder)
    for prompt, height, message in (
        (None, 64, "a prompt is None: expected text"),
        (CAPTION, "64", "the size 64x64: sides"),
        (CAPTION, 64.0, "the size 64.0x64: sides"),
        (CAPTION, 0, "the size 0x64: sides"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.bits(prompt, height, 64, SAMPLING)  # type: ignore[arg-type]
