"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.plan.estimate import Plan
from trainer.plan.gpus import GIB

DAY = 86400.0


def plan_lines(plan: Plan, fixes: list[str]) -> list[str]:
    """The whole answer, line by line.

    Args:
        fixes: what would make it fit, where it does not.
    """
    return [
        *_heading(plan),
        *_memory(plan, fixes),
        *_packs(plan),
        *_time(plan),
        *_disk(plan),
        *_assumed(plan),
    ]


def _heading(plan: Plan) -> Iterator[str]:
    parts = plan.parameters.by_part
    yield f"{plan.recipe.run}: {plan.recipe.steps} steps on {plan.ranks} x {plan.gpu_name}"
    shown = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in parts.items() if count)
    yield f"Parameters: {plan.parameters.all / 1e9:.2f} billion ({shown})"
    if plan.parameters.frozen:
        yield f"  trained: {plan.parameters.total / 1e9:.2f} billion; the others stay as they are"


def _memory(plan: Plan, fixes: list[str]) -> Iterator[str]:
    memory, zero = plan.memory, plan.recipe.zero
    states, acts = memory.states, memory.activations
    again = "kept inputs only" if plan.recipe.activation_checkpointing else "all kept"
    gathered = "weights gathered, gradients on their way" if zero.stage == 3 else "gradients on their way"
    yield ""
    yield f"Memory of each GPU, GiB (ZeRO-{zero.stage}, {plan.recipe.precision}):"
    for name in ("weights", "gradients", "master", "moments", "average"):
        if value := getattr(states, name):
            yield _row(name, value)
    yield _row("communication", memory.communication, gathered)
    yield _row("activations of layers", acts.per_layer * acts.layers, f"{acts.layers} layers, {again}")
    yield _row(
        "activations under way", acts.under_way, "a layer, the head or the logits, whichever needs most"
    )
    yield _row("  head alone", acts.head)
    yield _row("  logits alone", acts.logits)
    if memory.step > memory.communication + acts.peak:
        yield _row("optimizer's step", memory.step, "in place of communication and activations")
    yield _row("reserved", memory.reserved, "context, libraries, fragmentation")
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield _row("total", memory.total, f"of {plan.gpu.memory / GIB:.1f}: {verdict}")
    offloaded = f"{states.host / GIB:.1f} offloaded, " if states.host else ""
    yield f"Host memory of each rank, GiB: {offloaded}{memory.save / GIB:.1f} for the copy that a save writes"
    if states.nvme:
        yield f"On the disk of each rank, GiB: {states.nvme / GIB:.1f} offloaded"
    if not plan.fits:
        yield "What would make it fit:" if fixes else "Nothing known here makes it fit: take a larger GPU."
        yield from (f"  - {fix}" for fix in fixes)


def _packs(plan: Plan) -> Iterator[str]:
    batch = plan.batch
    yield ""
    yield (
        f"Steps: {plan.recipe.data.global_batch_size} images, {batch.tokens / 1e6:.2f}M tokens, "
        f"{batch.micro_steps:.3g} micro-steps of at most {plan.recipe.data.max_tokens} tokens"
    )
    yield f"  token utilization {batch.utilization:.1%}, cost imbalance {batch.imbalance:.3f} (max over mean)"


def _time(plan: Plan) -> Iterator[str]:
    work, saving = plan.work, plan.saving
    images = plan.recipe.data.global_batch_size / work.step_seconds
    price = plan.dollars / (plan.seconds / 3600 * plan.ranks)
    hidden = (
        "hidden behind computing" if work.network_seconds <= work.compute_seconds else "LONGER than computing"
    )
    yield ""
    yield (
        f"Time: {work.step_seconds:.2f} s a step at {plan.rates.mfu:.0%} MFU "
        f"({plan.batch.flops / 1e15:.1f} PFLOP), {images:.0f} images/s"
    )
    yield f"  network {work.network_seconds:.2f} s a step, {hidden}"
    if work.host_seconds:
        threads = plan.recipe.world.threads
        yield f"  host {work.host_seconds:.2f} s a step: the optimizer's, on {threads} threads of each rank"
    yield (
        f"  {plan.seconds / DAY:.1f} days, {plan.seconds / 3600 * plan.ranks:,.0f} GPU hours, "
        f"${plan.dollars:,.0f} at ${price:.2f} a GPU hour"
    )
    yield (
        f"  failures every {saving.mtbf_seconds / 3600:.0f} h of {plan.ranks} GPUs leave "
        f"{saving.effective:.1%} of the time, counted above"
    )


def _disk(plan: Plan) -> Iterator[str]:
    saving, every = plan.saving, plan.recipe.checkpoints.every_minutes
    yield ""
    yield f"Checkpoint: {saving.bytes / 1e9:.0f} GB, {saving.bytes / plan.ranks / 1e9:.2f} GB from each rank"
    yield (
        f"  best interval {saving.best_seconds / 60:.0f} min with a stall of {saving.stall_seconds:.0f} s "
        "(Young/Daly)"
        + (f"; the recipe's {every:.0f} min leave {saving.effective_at(every * 60):.1%}" if every else "")
    )
    images = plan.recipe.data.global_batch_size * plan.recipe.steps
    total = plan.batch.bits_bytes * plan.recipe.steps
    yield f"Dataset: {images / 1e6:.4g}M images seen; {total / 1e12:.3g} TB of bits if no image comes twice"


def _assumed(plan: Plan) -> Iterator[str]:
    if plan.assumptions:
        yield ""
        yield "Assumed:"
        yield from (f"  - {line}" for line in plan.assumptions)


def _row(name: str, size: int, note: str = "") -> str:
    return f"  {name:<22} {size / GIB:>8.2f}" + (f"   {note}" if note else "")
