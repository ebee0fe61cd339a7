"""What a recipe is on a cluster: which script does it, with which options, and what must be there before."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.tokenize.recipe import TokenizeRecipe
from foundation.errors import Problems, RecipeError
from foundation.recipes import load_recipe, resolved_yaml
from foundation.sections import Section
from slurm.history import COMMENT, JobFolder
from slurm.script import options_of
from slurm.site import Site, SiteFile
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder, claimed, find_run

# The keys by which a recipe's kind is told; which of its other keys are right, its own type says.
KINDS: dict[type[Section], set[str]] = {
    StageRecipe: {"run", "steps", "model"},
    TokenizeRecipe: {"input", "classes", "output"},
    FilterRecipe: {"sources", "rules", "output"},
}


@dataclass(frozen=True)
class Asked:
    """What a person asks for besides the recipe.

    Attributes:
        nodes: `N` or `N-M`, for stages.
        slices: elements of a tokenize array.
    """

    nodes: str = "1"
    slices: int = 16


@dataclass(frozen=True)
class Work:
    """One job to submit.

    Attributes:
        title: for people.
        script: its file in this folder.
        arguments: of the script.
        options: of sbatch.
        folder: where its traces go.
        site: what it takes of the cluster.
        reads: key of the recipe -> local path, or glob, that must be there when it starts.
        makes: path that is there when it has ended.
        recipe: what the job carries out, where that is a recipe.
        source: its file and overrides, as for the command line.
        check: notes what else is wrong with it.
    """

    title: str
    script: str
    arguments: tuple[str, ...]
    options: dict[str, str | None]
    folder: JobFolder
    site: Site
    reads: dict[str, Path] = field(default_factory=dict)
    makes: Path | None = None
    recipe: Section | None = None
    source: tuple[str, ...] = ()
    check: Callable[[Problems], None] | None = None

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.makes is not None and self.makes.exists()

    def capture(self) -> None:
        """Write the recipe down as it is now: what is changed in its file later does not reach the job."""
        if isinstance(self.recipe, StageRecipe):
            with claimed(self.recipe):
                pass
        elif self.recipe is not None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            (self.folder.path / "recipe.yaml").write_text(resolved_yaml(self.recipe))


def open_recipe(path: Path, overrides: Sequence[str]) -> Section:
    """A recipe of any kind that runs on a cluster.

    Raises:
        RecipeError: it is of another kind, or wrong.
    """
    try:
        values: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = None
    keys = set(values) if isinstance(values, dict) else set()
    kind = max(KINDS, key=lambda kind: len(KINDS[kind] & keys))
    if keys and not KINDS[kind] & keys:
        raise RecipeError(f"{path} is no recipe of a stage, of `data tokenize` or of `data filter`")
    loaded: Section = load_recipe(kind, path, overrides)
    return loaded


def work_of(recipe: Section, asked: Asked, file: SiteFile) -> list[Work]:
    """The jobs that carry a recipe out, in order."""
    if isinstance(recipe, StageRecipe):
        return [stage_work(recipe, asked, file.site)]
    if isinstance(recipe, TokenizeRecipe):
        return tokenize_work(recipe, asked, file.site)
    assert isinstance(recipe, FilterRecipe)
    return [filter_work(recipe, file.site)]


def stage_work(recipe: StageRecipe, asked: Asked, site: Site) -> Work:
    """Training a stage: one process per GPU, or per `world.processes` where nodes have none."""
    if site.dataset_cache is not None:
        recipe = recipe.model_copy(
            update={"world": recipe.world.model_copy(update={"cache": site.dataset_cache})}
        )
    recipe = find_run(recipe)
    run = RunFolder(Path(recipe.run))
    folder = JobFolder.of_run(run.path)
    tasks = site.gpus_per_node or recipe.world.processes
    options = common_options(site, run.path.name, folder) | {
        "nodes": asked.nodes,
        # One is what sbatch does by itself; said aloud, it makes a range of nodes its least number.
        "ntasks-per-node": str(tasks) if tasks > 1 else None,
        "gpus-per-node": str(site.gpus_per_node) if site.gpus_per_node else None,
        "signal": f"B:USR1@{site.save_seconds}",
    }
    options["cpus-per-task"] = str(max(site.cpus_per_task, recipe.world.threads))
    options |= options_of(site.sbatch_options)
    return Work(
        title=f"train {recipe.run}",
        script="train.sbatch",
        arguments=(str(run.recipe),),
        options=options,
        folder=folder,
        site=site,
        reads=_stage_reads(recipe),
        makes=run.export,
        recipe=recipe,
    )


def _stage_reads(recipe: StageRecipe) -> dict[str, Path]:
    random = recipe.model.random
    return local_paths(
        {
            "tokenizer": recipe.tokenizer,
            "data.latents": f"{recipe.data.latents}/manifest.json",
            "model.init_from": recipe.model.init_from,
            "model.pretrained": path_of(recipe.model.pretrained),
            "model.random.text_tokenizer": random.text_tokenizer if random else None,
        }
    )


def local_paths(named: Mapping[str, str | None]) -> dict[str, Path]:
    """What stands in files and folders, of what some keys of a recipe name."""
    return {key: Path(value) for key, value in named.items() if value is not None and is_local(value)}


def path_of(name: str | None) -> str | None:
    """A name that is one of a folder or one on the hub, where it is that of a folder."""
    return name if name is not None and (os.path.isabs(name) or os.path.exists(name)) else None


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder, and not an address or a name on the hub."""
    return "://" not in name and not name.startswith("hf:")


def tokenize_work(recipe: TokenizeRecipe, asked: Asked, site: Site) -> list[Work]:
    """The array over the tasks, and what finishes the dataset after it."""
    folder, gpu = JobFolder.beside(recipe.output), recipe.compute.device == "cuda"
    finish = command_work(
        f"finalize {recipe.output}", ("data", "finalize", recipe.output), recipe.output, site
    )
    site = site.of_data(gpu)
    manifest = Path(recipe.output) / "manifest.json" if is_local(recipe.output) else None
    options = common_options(site, Path(recipe.output).name, folder) | {
        "gpus-per-node": "1" if gpu else None,
        "array": f"0-{asked.slices - 1}%{site.array_at_once}",
        "output": folder.log_pattern("%A_%a.log"),
    }
    array = Work(
        title=f"tokenize {recipe.output} in {asked.slices} slices",
        script="tokenize.sbatch",
        arguments=(str(folder.path / "recipe.yaml"), str(asked.slices)),
        options=options | options_of(site.sbatch_options),
        folder=folder,
        site=site,
        reads=_tokenize_reads(recipe),
        makes=manifest,
        recipe=recipe,
    )
    return [array, replace(finish, makes=manifest)]


def _tokenize_reads(recipe: TokenizeRecipe) -> dict[str, Path]:
    return local_paths(
        {f"input.path.{number}": path for number, path in enumerate(recipe.input.path)}
        | {
            "input.captions": recipe.input.captions,
            "keep.rows": recipe.keep.rows if recipe.keep else None,
            "tokenizer": recipe.tokenizer,
            "text_tokenizer.name": path_of(recipe.text_tokenizer.name),
        }
    )


def filter_work(recipe: FilterRecipe, site: Site) -> Work:
    """Choosing the rows of metadata that are worth having."""
    arguments = ("data", "filter", str(JobFolder.beside(recipe.output).path / "recipe.yaml"))
    work = command_work(f"filter {recipe.output}", arguments, recipe.output, site)
    joined = {
        f"joins.{number}.files.{place}": path
        for number, join in enumerate(recipe.joins)
        for place, path in enumerate(join.files)
    }
    reads = local_paths({f"sources.{number}": path for number, path in enumerate(recipe.sources)} | joined)
    return replace(work, recipe=recipe, reads=reads, makes=Path(recipe.output) / "kept.parquet")


def command_work(title: str, arguments: tuple[str, ...], output: str, site: Site) -> Work:
    """One command of bitdance on one node, without a GPU."""
    folder, site = JobFolder.beside(output), site.of_data(gpu=False)
    options = common_options(site, Path(output).name, folder) | {"gpus-per-node": None}
    return Work(
        title=title,
        script="command.sbatch",
        arguments=arguments,
        options=options | options_of(site.sbatch_options),
        folder=folder,
        site=site,
    )


def common_options(site: Site, name: str, folder: JobFolder) -> dict[str, str | None]:
    """sbatch's options that all jobs have."""
    # Left as the scripts have it where the site file says nothing: a node's memory.
    memory = {"mem": site.memory_per_node} if site.memory_per_node else {}
    return memory | {
        "job-name": f"bitdance-{name}",
        "comment": f"{COMMENT}{folder.path.resolve()}",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "cpus-per-task": str(site.cpus_per_task),
        "time": site.time_limit,
        "chdir": os.getcwd(),
        "output": folder.log_pattern("%j.log"),
    }
