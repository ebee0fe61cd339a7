"""The training loop: next batch, losses, backward, guard, step, log, save."""

from __future__ import annotations

import time

from data_pipeline.loader import StepBatch
from data_pipeline.store import writing_to
from foundation.errors import DataError, ExitCode
from foundation.progress import say
from trainer.agreement import StepReport, gather_report
from trainer.export import write_export
from trainer.losses import StepLosses
from trainer.meter import memory_bytes
from trainer.schedule import learning_rate
from trainer.stage import Stage


def train(stage: Stage) -> ExitCode:
    """Do the steps that are missing, then export. DONE, or REQUEUE where a signal asked to stop before the
    end.

    After a bad step nothing is saved before one goes well: the state may be what made it bad, and a run that
    goes back would go back to it.

    Raises:
        DataError: the run went back to its last checkpoint several times and never got past the bad steps; or
            its last steps were bad, and so were those that would follow.
        StaleStart: a newer start of the run has taken over.
    """
    recipe, engine = stage.recipe, stage.engine
    stage.watchdog.start()
    while (progress := stage.progress).step < recipe.steps:
        if progress.step in progress.passed_over:
            progress.step += 1
            continue
        started = time.monotonic()
        batch, means, report = _gradient(stage, progress.step)
        reason = stage.guard.verdict(means["loss"], report.norm)
        lr = learning_rate(recipe.optimizer, recipe.steps, progress.step)
        if reason is None:
            engine.step(lr)
            stage.average_weights()
            stage.note_taken(means["loss"], report.norm)
        else:
            engine.discard_gradient()
            stage.note_skip(batch, reason)

        progress.step += 1
        progress.seconds += time.monotonic() - started
        stage.step_done()
        stage.log_step(batch, means, report, lr, time.monotonic() - started, reason)
        due = report.save or stage.steps_say_save()
        if stage.guard.wants_rewind:
            _rewind(stage)
        elif report.stop:
            return _stop(stage)
        elif due and not report.saving and not stage.guard.skipped_in_a_row:
            stage.save()
    _refuse_a_bad_end(stage)
    return _finish(stage)


def _gradient(stage: Stage, number: int) -> tuple[StepBatch, dict[str, float], StepReport]:
    """Forward and backward of a step: what it computed on, its losses, what the ranks say to it."""
    started, engine = time.monotonic(), stage.engine
    batch = stage.loader.step(number)
    data_wait = time.monotonic() - started
    losses = StepLosses(stage.recipe.loss, batch.counts, stage.ranks, engine.device)
    micro_batches = zip(batch.micro_batches, batch.resolutions, strict=True)
    for micro_step, (pack, resolutions) in enumerate(micro_batches):
        stage.seed_dropout(micro_step)
        last = pack is batch.micro_batches[-1]
        patch_resolution = resolutions[pack.patch_sample].to(engine.device)
        engine.backward(losses.add(engine(pack.to(engine.device)), patch_resolution), last)
    report = gather_report(
        losses.sums,
        engine.squared_gradient_norm(),
        data_wait,
        memory_bytes(),
        stage.stop.asked,
        stage.clock_says_save(),
        stage.checkpoints.saving,
    )
    return batch, losses.means(report.sums), report


def _rewind(stage: Stage) -> None:
    """Back to the last checkpoint; the steps skipped in a row are passed over from now on."""
    before, limit = stage.progress, stage.recipe.guard.max_rewinds
    bad = [skip["step"] for skip in before.skipped[-stage.guard.skipped_in_a_row :]]
    if before.rewinds == limit:
        raise DataError(
            f"Steps {bad[0]} to {bad[-1]} had to be skipped after {limit} returns to the last checkpoint, so "
            f"the cause is not a few bad samples. {_causes(stage)}"
        )
    with stage.unhurried():
        stage.restore()
    passed_over = before.passed_over | set(bad)
    # Of those that are not passed over, what lies ahead again will be noted again.
    skipped = [s for s in before.skipped if s["step"] < stage.progress.step or s["step"] in passed_over]
    stage.progress.passed_over, stage.progress.skipped = passed_over, skipped
    stage.progress.rewinds = before.rewinds + 1
    stage.guard.skipped_in_a_row = 0
    if stage.metrics is not None:
        stage.metrics.go_back_to(stage.progress.step)
    stage.events.write("rewound", step=before.step, to_step=stage.progress.step, passed_over=bad)
    if stage.rank == 0:
        say(f"Back to step {stage.progress.step}; steps {bad[0]} to {bad[-1]} are passed over from now on")


def _refuse_a_bad_end(stage: Stage) -> None:
    """Where no step has gone well beyond the last bad one, those after the end tell whether the samples are
    to blame, or the weights. Nothing is learned from them.
    """
    if not (stage.guard.skipped_in_a_row or stage.progress.rewinds):
        return
    steps, tries = stage.recipe.steps, stage.recipe.guard.rewind_after
    for number in range(steps, steps + tries):
        _, means, report = _gradient(stage, number)
        stage.engine.discard_gradient()
        reason = stage.guard.verdict(means["loss"], report.norm)
        if reason is None:
            return
    raise DataError(
        f"The last steps had to be skipped, and so would the {tries} after them ({reason}): nothing is "
        f"exported. {_causes(stage)}"
    )


def _causes(stage: Stage) -> str:
    return (
        f"{stage.run.events} has the reasons, and the samples by class and number. Look at the data, or "
        "lower the learning rate (in a new run: --fork); where the last checkpoint is bad already, move it "
        "away, and the run goes on from the one before."
    )


def _stop(stage: Stage) -> ExitCode:
    """Save and leave, to be started again. Between bad steps nothing is saved: to do the steps since the last
    checkpoint again costs minutes, a bad state that has become the last checkpoint may cost the run.
    """
    stage.end_steps()
    if not stage.guard.skipped_in_a_row:
        stage.save()
    stage.checkpoints.wait()
    step, saved = stage.progress.step, stage.checkpoints.newest
    stage.events.write("stopped", step=step, saved=saved, signal=stage.stop.signal)
    if stage.rank == 0:
        told = "saved. The same command goes on from here"
        if saved != step:
            why = "the last steps were skipped" if stage.guard.skipped_in_a_row else "the save failed"
            told = f"NOT SAVED ({why}). The same command goes on from step {saved}"
        say(f"Stopped by {stage.stop.signal} after step {step}: {told}.")
    return ExitCode.REQUEUE


def _finish(stage: Stage) -> ExitCode:
    """Save the last state, then export it."""
    stage.end_steps()
    if stage.saved_step != stage.progress.step:
        stage.save()
    stage.checkpoints.wait()
    average = stage.average.values if stage.average else None
    start = stage.checkpoints.start
    with writing_to(stage.run.export):
        write_export(stage.run, stage.recipe, stage.engine, stage.source, stage.lineage, average, start)
    stage.finish_samples()
    stage.events.write("finished", step=stage.progress.step)
    if stage.rank == 0:
        newest, steps = stage.checkpoints.newest, stage.recipe.steps
        note = "" if newest == steps else f" (not saved as a checkpoint; the last one is of step {newest})"
        say(f"Finished {steps} steps: the model is in {stage.run.export}{note}")
    return ExitCode.DONE
