"""A tiny text-to-image model in the published folder layout, and its JSON files changed."""

import json
from pathlib import Path

import tiny_models as cases

from models.text_to_image import TextToImageModel
from models.weights import save_folder

TOKENIZER = cases.text_tokenizer(4)
ROWS = len(TOKENIZER) + 5  # as Qwen, whose embedding has more rows than its tokenizer has tokens


def saved(folder: Path, **options: object) -> TextToImageModel:
    model = cases.text_to_image(ROWS, **options)  # type: ignore[arg-type]
    save_folder(model, TOKENIZER, folder)
    return model


def edit(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))
