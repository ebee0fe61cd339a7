"""`bitdance generate`, `compare` and `quickstart`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import DataError, Problems, RecipeError
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

    A picture that this command has made already, with the same settings and weights, is not made again; a
    file that it has not made is never overwritten.
    """
    _refuse_options(prompt, size, sampler, dtype, device, output)
    height, width = map(int, size.lower().split("x"))
    from evaluation.picture_files import (
        PictureRequest,
        picture_name,
        picture_settings,
        refuse_foreign,
        source_of,
        up_to_date,
    )
    from evaluation.recipes import Sampling

    settings = {"steps": steps, "guidance": guidance, "sampler": sampler, "seed": seed}
    sampling = Sampling.model_validate(settings)
    source = source_of(model, tokenizer, device, dtype)
    todo: list[PictureRequest] = []
    for text in prompt:
        paths = [output / picture_name(text, seed, number) for number in range(pictures)]
        note = picture_settings(text, (height, width), sampling, pictures, source)
        if all(up_to_date(path, note) for path in paths):
            say(f"nothing to do: {', '.join(map(str, paths))} made with these settings already")
        else:
            todo.append(PictureRequest(text, paths, note))
    refuse_foreign(path for request in todo for path in request.paths)
    if todo:
        _generate(model, tokenizer, todo, (height, width), sampling, device, dtype)


def _refuse_options(
    prompts: list[str], size: str, sampler: str, dtype: str | None, device: str | None, output: Path
) -> None:
    """RecipeError with all that is wrong with options that typer takes for text."""
    problems = Problems()
    for number, text in enumerate(prompts):
        if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that Python could not decode
            problems.add(f"--prompt number {number + 1}", "is not UTF-8")
    if not re.fullmatch(r"\d+x\d+", size.lower(), re.ASCII):
        problems.add(f"--size {size}", "expected HEIGHTxWIDTH in pixels, for example 1024x1024")
    if sampler not in ("euler_maruyama", "euler"):
        problems.add(f"--sampler {sampler}", "expected euler_maruyama or euler")
    if dtype not in (None, "bfloat16", "float32"):
        problems.add(f"--dtype {dtype}", "expected bfloat16 or float32")
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        problems.add(f"--device {device}", "expected cpu, cuda, or cuda:1 and the like")
    if output.exists() and not output.is_dir():
        problems.add(f"--output {output}", "is a file: name a folder")
    problems.raise_if_any(RecipeError, "No picture can be made so")


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
    except ValueError as error:  # what models/ says of a folder
        raise DataError(str(error)) from error
    try:
        generator.check([request.prompt for request in todo], *size, sampling)
        say(f"{model}: {device}, {dtype}, {describe_attention(torch.device(device).type)}")
        for request in todo:
            generate_files(generator, request, size, sampling)
            for path in request.paths:
                say(f"wrote {path}")
    except ValueError as error:  # what models/ says of a size or a prompt
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
    except ValueError as error:  # what models/ says of a folder, or of captions and sizes that it cannot have
        raise DataError(str(error)) from error


@app.command()
def quickstart() -> None:
    """The whole path with a tiny model: photos, tokenizer, latents, four stages, pictures.

    Takes minutes on two CPU cores, and goes on where it was interrupted. Each command is printed as it runs;
    all that they write is in runs/quickstart: look at grid.png and report.json.
    """
    from evaluation.quickstart import run_quickstart

    run_quickstart()
