"""`bitdance generate`, `compare` and `quickstart`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import RecipeError
from foundation.progress import say
from models.flow_settings import FlowSettings

if TYPE_CHECKING:
    from evaluation.picture_files import PictureRequest
    from evaluation.recipes import Sampling

app = typer.Typer()


# Twelve parameters: typer knows no other way to declare a command's options.
@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="An export of training, or a published model folder.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to paint; may be repeated.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels.")] = "1024x1024",
    guidance: Annotated[
        float, typer.Option(help="Guidance scale; 1 = none.", min=1)
    ] = FlowSettings().guidance,
    steps: Annotated[
        int, typer.Option(help="Solver steps of each patch; 10 to 50 are useful.", min=1)
    ] = FlowSettings().steps,
    sampler: Annotated[str, typer.Option(help="euler_maruyama or euler.")] = FlowSettings().sampler,
    seed: Annotated[int, typer.Option(help="Of the noise.", metavar="N", min=0, max=2**63 - 1)] = 0,
    pictures: Annotated[int, typer.Option("--pictures", "-n", help="Pictures for each prompt.", min=1)] = 1,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Binary tokenizer, where the model's folder holds none.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNG files.")] = Path(
        "samples"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; bfloat16 on a GPU.")] = None,
) -> None:
    """Sample pictures from prompts and write them as PNG.

    For example: bitdance generate runs/quickstart/distill/export --size 256x256 -p "A cup of coffee"

    A picture that this command has made already, with the same settings and weights, is not made again.
    """
    size_ = _parse_size(size)
    if sampler not in ("euler_maruyama", "euler"):
        raise RecipeError(f"--sampler {sampler}: expected euler_maruyama or euler")
    if dtype not in (None, "bfloat16", "float32"):
        raise RecipeError(f"--dtype {dtype}: expected bfloat16 or float32")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RecipeError(f"--device {device}: expected cpu, cuda, or cuda:1 and the like")
    if output.exists() and not output.is_dir():
        raise RecipeError(f"--output {output} is a file: name a folder")
    from evaluation.picture_files import PictureRequest, picture_name, picture_settings, source_of, up_to_date
    from evaluation.recipes import Sampling

    settings = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed}
    sampling = Sampling.model_validate(settings)
    source = source_of(model, tokenizer, device, dtype)
    todo: list[PictureRequest] = []
    for text in prompt:
        paths = [output / picture_name(text, seed, number) for number in range(pictures)]
        note = picture_settings(text, size_, sampling, pictures, source)
        if all(up_to_date(path, note) for path in paths):
            say(f"nothing to do: {', '.join(map(str, paths))} made with these settings already")
        else:
            todo.append(PictureRequest(text, paths, note))
    if todo:
        _generate(model, tokenizer, todo, size_, sampling, device, dtype)


def _generate(
    model: Path,
    tokenizer: Path | None,
    todo: list[PictureRequest],
    size: tuple[int, int],
    sampling: Sampling,
    device: str | None,
    dtype: str | None,
) -> None:
    """Load the model, then make each prompt's pictures."""
    import torch

    from evaluation.generate import PictureGenerator, generate_files
    from models.backbone import describe_attention

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"--device {device}: torch sees no GPU here; leave the option out, or give cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    try:
        generator = PictureGenerator(model, tokenizer, device, getattr(torch, dtype))
        generator.check([request.prompt for request in todo], *size, sampling)
        say(f"{model}: {device}, {dtype}, {describe_attention(torch.device(device).type)}")
        for request in todo:
            generate_files(generator, request, size, sampling)
            for path in request.paths:
                say(f"wrote {path}")
    except ValueError as error:  # what models/ says of a folder, a size or a prompt
        raise RecipeError(str(error)) from error


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe such as configs/quickstart/compare.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one value, for example --set samples=4."),
    ] = None,
) -> None:
    """Photos beside their reconstructions and what models generate from their captions.

    Writes grid.png, a row for each caption, and comparison.json: PSNR of the reconstructions, and the share
    of generated bits that equal the photo's (chance: 0.5).
    """
    from evaluation.recipes import CompareRecipe
    from foundation.recipes import load_recipe

    loaded = load_recipe(CompareRecipe, recipe, overrides or ())
    from evaluation.compare import compare as run

    try:
        run(loaded)
    except ValueError as error:  # what models/ says of a folder
        raise RecipeError(str(error)) from error


@app.command()
def quickstart() -> None:
    """The whole path with a tiny model: photos, tokenizer, latents, four stages, pictures.

    Takes minutes on two CPU cores, and goes on where it was interrupted. Each command is printed as it runs;
    all that they write is in runs/quickstart: look at grid.png and report.json.
    """
    from evaluation.quickstart import run_quickstart

    run_quickstart()


def _parse_size(size: str) -> tuple[int, int]:
    height, _, width = size.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise RecipeError(f"--size {size}: expected HEIGHTxWIDTH in pixels, for example 1024x1024")
    return int(height), int(width)
