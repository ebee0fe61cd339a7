"""Whether a stage fits on what it asks for.

The trainer's own modules are asked; those that need torch are imported where there is something to ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import Problems, RecipeError, UserError
from foundation.progress import say
from slurm.work import Work
from trainer.recipe import StageRecipe

if TYPE_CHECKING:
    from data_pipeline.global_batch import LatentSource

USUAL_DOWNSAMPLE = 16  # pixels of a token's side, where the tokenizer is not here


def check_batch(
    problems: Problems, work: Work, recipe: StageRecipe, least_most: tuple[int, int], there: int, unit: str
) -> None:
    """Note the numbers of nodes, of those asked for, on which some step could not be cut for the ranks.

    Args:
        least_most: numbers of nodes asked for.
        there: how many nodes the partition has; the job never gets more, whatever is asked for.
        unit: what a rank has: "GPUs" or "processes".
    """
    least, tasks = least_most[0], int(work.options["ntasks-per-node"] or 1)
    most = max(least, min(least_most[1], there))
    try:
        packs = _Packs(recipe)
        refused = packs.refused(range(least, most + 1), tasks)
        smaller = range(1, min(least, there + 1))
        others = packs.refused(smaller, tasks) if refused else {}
    except UserError as error:  # of the dataset, however many ranks there are
        problems.add(work.title, str(error))
        return
    if refused:
        first, *rest = refused
        found = f"on {first} nodes {refused[first]} {unit}" + (f"; nor on {_ranges(rest)}" if rest else "")
        right = _ranges(n for n in (*smaller, *range(least, most + 1)) if n not in refused | others)
        fix = f"these numbers of nodes do: {right}; or" if right else "no smaller number does:"
        fix += " change data.global_batch_size, best to a multiple of the ranks"
        problems.add(f"{work.title}: --nodes {work.options['nodes']}", found, fix)


def check_memory(problems: Problems, work: Work, recipe: StageRecipe, ranks: int, kind: str) -> None:
    """Note it where `bitdance plan` finds that the stage needs more than so many GPUs of this kind."""
    from trainer.plan.estimate import Rates, make_plan
    from trainer.plan.model_size import model_size
    from trainer.plan.remedies import remedies

    path = Path(work.source[0])
    try:
        model_size(recipe, path)
    except RecipeError as error:
        say(f"{work.title}: whether it fits into its GPUs is not looked at. {error}")
        return
    try:
        plan = make_plan(recipe, path, ranks, kind, Rates(0.4, None, None, 30.0))  # no matter for the memory
    except UserError as error:
        problems.add(work.title, str(error))
        return
    if not plan.fits:
        found = f"it needs more than the {ranks} GPUs ({kind}) asked for"
        problems.add(work.title, found, "; ".join(remedies(plan)))


def _ranges(numbers: Iterable[int]) -> str:
    """`2, 4-7` of the numbers 2, 4, 5, 6, 7."""
    steps = count()
    runs = [list(run) for _, run in groupby(numbers, key=lambda number: number - next(steps))]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


class _Packs:
    """Whether the trainer could cut every step of a stage for so many ranks."""

    def __init__(self, recipe: StageRecipe):
        self._recipe = recipe

    def refused(self, numbers: range, tasks: int) -> dict[int, str]:
        """Those of some numbers of nodes, with so many ranks each, that cannot train, and why.

        Raises:
            UserError: the dataset is here and cannot be trained on at all.
        """
        found: dict[int, str] = {}
        size, limit = self._recipe.data.global_batch_size, self._recipe.data.max_tokens
        for nodes in numbers:
            ranks = nodes * tasks
            if ranks > size:
                found[nodes] = f"{size} samples cannot be shared out among {ranks}"
            elif not self._recipe.zero.can_share_copies(ranks):
                copies = self._recipe.zero.copy_size
                found[nodes] = f"zero.zero_hpz_partition_size: {copies} does not divide {ranks}"
            # Ranks that divide the batch can always have each sample in a pack of its own.
            elif size % ranks and not self._can_be_cut(ranks):
                packs = f"packs of at most {limit} tokens, equally many for each of {ranks}"
                found[nodes] = f"{size} samples cannot be cut into {packs}"
        return found

    def _can_be_cut(self, ranks: int) -> bool:
        if self._dataset is None:
            return True  # it is not known
        try:
            self._plan(self._dataset, ranks)
        except RecipeError:
            return False
        return True

    @cached_property
    def _dataset(self) -> LatentSource | None:
        """The recipe's; where it is not there yet, what `bitdance plan` takes for it, if that can be had."""
        from trainer.plan.batches import AssumedDataset, open_dataset

        dataset = open_dataset(self._recipe.data, token_side(self._recipe) or USUAL_DOWNSAMPLE, [])
        try:
            self._plan(dataset, 1)
        except RecipeError:
            if isinstance(dataset, AssumedDataset):
                return None
            raise
        return dataset

    def _plan(self, dataset: LatentSource, ranks: int) -> None:
        from data_pipeline.global_batch import BatchPlan
        from data_pipeline.packing import SampleCost
        from trainer.plan.model_size import QWEN_TEMPLATE

        recipe = self._recipe
        BatchPlan(recipe.data, dataset, recipe.model.p, QWEN_TEMPLATE, ranks, SampleCost(1.0))


def token_side(recipe: StageRecipe) -> int | None:
    """Pixels that a token stands for, down and across; None where the tokenizer cannot be read."""
    from models.tokenizer import read_tokenizer_config

    try:
        return read_tokenizer_config(recipe.tokenizer).downsample
    except ValueError:
        return None
