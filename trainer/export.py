"""The one artifact between stages: a folder in the published layout, with the record of where it came
from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.tokenize.captions import text_tokenizer_hash
from foundation.files import atomic_write, commit_folder
from models.weights import FolderWriter, ModelSource, TensorSpec
from trainer.adapters import merged
from trainer.checkpoint_files import StaleStart, describe_file, refuse_stale
from trainer.engine import Engine
from trainer.recipe import StageRecipe
from trainer.run_folder import EXPORT_MANIFEST, RunFolder


def write_export(
    run: RunFolder,
    recipe: StageRecipe,
    engine: Engine,
    source: ModelSource,
    lineage: dict[str, Any],
    ema: dict[str, Tensor] | None,
    start: int,
) -> None:
    """Gather the weights tensor by tensor and write them to `run.export`, which appears whole (collective).

    What is exported is the average of the weights where the recipe keeps one, in the precision trained in.

    Args:
        start: number of this start of the run.

    Raises:
        StaleStart: a newer start of the run has taken over.
    """
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    specs = {name: TensorSpec(spec.shape, dtype) for name, spec in source.specs.items()}
    partial = run.path / f"export.partial-{start}"
    if dist.get_rank() == 0:
        for left_over in run.path.glob("export.partial-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        writer = FolderWriter(partial, source.config, specs)
        order = list(writer.names)
    order = order if dist.get_rank() == 0 else []
    orders: list[Any] = [order]
    dist.broadcast_object_list(orders, src=0)
    for name in orders[0]:
        whole = merged(name, recipe.model.lora, lambda parameter: engine.state.whole(parameter, ema))
        if dist.get_rank() == 0:
            writer.add(name, whole.to(dtype))
    if dist.get_rank() == 0:
        writer.finish(source.text_tokenizer, recipe.tokenizer)
        _write_manifest(partial, recipe.steps, source, lineage)
    stale: list[StaleStart | None] = [None]
    if dist.get_rank() == 0:
        try:
            refuse_stale(run, start)
            commit_folder(partial, run.export)
        except StaleStart as error:
            stale = [error]
    dist.broadcast_object_list(stale, src=0)
    if stale[0] is not None:
        raise stale[0]


def _write_manifest(folder: Path, step: int, source: ModelSource, lineage: dict[str, Any]) -> None:
    manifest = {
        "step": step,
        "p": source.config.p,
        "vocabulary_sha256": text_tokenizer_hash(source.text_tokenizer),
        "lineage": lineage,
        "files": {path.name: describe_file(path) for path in sorted(folder.iterdir())},
    }
    with atomic_write(folder / EXPORT_MANIFEST) as file:
        json.dump(manifest, file, indent=1)
