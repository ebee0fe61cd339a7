"""What would make a plan fit, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from trainer.model_recipe import LoraSection
from trainer.plan.activations import activation_bytes
from trainer.plan.estimate import DTYPES, Memory, Plan, memory_of
from trainer.plan.gpus import GIB
from trainer.plan.states import count_parameters
from trainer.recipe import OffloadSection, StageRecipe

MOST_TIMES_THE_GPUS = 64
HOST = OffloadSection(device="cpu", pin_memory=True)
IN_HOST_MEMORY = "{device: cpu, pin_memory: true}, or {device: nvme, nvme_path: FOLDER} on a disk"
SMALL_BUCKET, SMALL_LIVE = 50_000_000, 100_000_000


@dataclass(frozen=True)
class Attempt:
    """A recipe that was changed to need less memory, on so many GPUs."""

    recipe: StageRecipe
    ranks: int


Change = Callable[[Attempt, Plan], Iterator[tuple[str, Attempt]]]


def remedies(plan: Plan) -> list[str]:
    """Changes that make the plan fit, a line each; where none does alone, as many as it takes, in one line.

    Activations are taken as proportional to `max_tokens`. Empty where nothing known here helps.
    """
    start = Attempt(plan.recipe, plan.ranks)
    alone = []
    for change in CHANGES:
        for words, attempt in change(start, plan):
            memory = _memory(plan, attempt)
            if memory.total <= plan.gpu.memory:
                alone.append(_line(words, memory))
                break
    return alone or _together(plan, start)


def _together(plan: Plan, attempt: Attempt) -> list[str]:
    taken: list[str] = []
    for change in CHANGES:
        best = _memory(plan, attempt).total
        for words, changed in change(attempt, plan):
            memory = _memory(plan, changed)
            if memory.total <= plan.gpu.memory:
                return [_line("; ".join([*taken, words]), memory)]
            if memory.total < best:
                best, kept = memory.total, (words, changed)
        if best < _memory(plan, attempt).total:
            taken.append(kept[0])
            attempt = kept[1]
    return []


def _line(words: str, memory: Memory) -> str:
    host = f", and {memory.host / GIB:.1f} of host memory for each rank" if memory.states.host else ""
    return f"{words}: {memory.total / GIB:.1f} GiB{host}"


def _memory(plan: Plan, attempt: Attempt) -> Memory:
    parameters, activations = plan.parameters, plan.memory.activations
    recipe, lora = attempt.recipe, attempt.recipe.model.lora
    adapted = lora != plan.recipe.model.lora
    if adapted or recipe.activation_checkpointing != plan.recipe.activation_checkpointing:
        dtype, again = DTYPES[recipe.precision], recipe.activation_checkpointing
        activations = activation_bytes(plan.model.config, plan.batch.packs, dtype, again, lora)
    if adapted:
        parameters = count_parameters(plan.model.config, lora)
    factor = recipe.data.max_tokens / plan.recipe.data.max_tokens
    names = ("per_layer", "under_way", "head", "logits")
    scaled = {name: int(factor * getattr(activations, name)) for name in names}
    return memory_of(recipe, parameters, replace(activations, **scaled), attempt.ranks)


def _compute_again(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    if not attempt.recipe.activation_checkpointing:
        changed = attempt.recipe.model_copy(update={"activation_checkpointing": True})
        yield "activation_checkpointing: true", replace(attempt, recipe=changed)


def _shard_more(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    for stage in range(attempt.recipe.zero.stage + 1, 4):
        yield f"zero.stage: {stage}", _with_zero(attempt, stage=stage)


def _smaller_packs(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    tokens = attempt.recipe.data.max_tokens // 2
    while tokens >= plan.batch.longest:
        data = attempt.recipe.data.model_copy(update={"max_tokens": tokens})
        changed = attempt.recipe.model_copy(update={"data": data})
        yield f"data.max_tokens: {tokens}", replace(attempt, recipe=changed)
        tokens //= 2


def _smaller_buckets(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    zero = {"reduce_bucket_size": SMALL_BUCKET}
    if attempt.recipe.zero.stage == 3:
        zero |= {"stage3_max_live_parameters": SMALL_LIVE, "stage3_prefetch_bucket_size": SMALL_BUCKET}
    words = ", ".join(f"zero.{key}: {value}" for key, value in zero.items())
    yield words, _with_zero(attempt, **zero)


def _one_copy(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    if attempt.recipe.zero.copy_size > 1:
        yield "zero.zero_hpz_partition_size: 1", _with_zero(attempt, zero_hpz_partition_size=1)


def _offload_optimizer(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    if attempt.recipe.zero.stage and not attempt.recipe.zero.offload_optimizer:
        yield f"zero.offload_optimizer: {IN_HOST_MEMORY}", _with_zero(attempt, offload_optimizer=HOST)


def _offload_weights(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    if attempt.recipe.zero.stage == 3 and not attempt.recipe.zero.offload_param:
        yield f"zero.offload_param: {IN_HOST_MEMORY}", _with_zero(attempt, offload_param=HOST)


def _adapters(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    model = attempt.recipe.model
    if model.init_from and not model.grow_from and not model.lora:
        lora = LoraSection()
        adapted = model.model_copy(update={"lora": lora})
        changed = attempt.recipe.model_copy(update={"model": adapted})
        words = f"model.lora: {{rank: {lora.rank}}} (trains adapters in place of the backbone)"
        yield words, replace(attempt, recipe=changed)


def _more_gpus(attempt: Attempt, plan: Plan) -> Iterator[tuple[str, Attempt]]:
    times = 2
    while times <= MOST_TIMES_THE_GPUS and attempt.ranks * times <= attempt.recipe.data.global_batch_size:
        yield f"--gpus {attempt.ranks * times}", replace(attempt, ranks=attempt.ranks * times)
        times *= 2


def _with_zero(attempt: Attempt, **values: object) -> Attempt:
    zero = attempt.recipe.zero.model_copy(update=values)
    return replace(attempt, recipe=attempt.recipe.model_copy(update={"zero": zero}))


CHANGES: tuple[Change, ...] = (
    _compute_again,
    _smaller_packs,
    _smaller_buckets,
    _one_copy,
    _shard_more,
    _more_gpus,
    _offload_optimizer,
    _offload_weights,
    _adapters,
)
