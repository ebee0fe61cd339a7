"""The training loop: next batch, losses, backward, guard, step, log, save."""

from __future__ import annotations

import time

from data_pipeline.store import writing_to
from foundation.errors import DataError, ExitCode
from foundation.progress import say
from trainer.agreement import gather_report
from trainer.export import write_export
from trainer.losses import StepLosses
from trainer.schedule import learning_rate
from trainer.stage import Stage


def train(stage: Stage) -> ExitCode:
    """Do the steps that are missing, then export. DONE, or REQUEUE where a signal asked to stop before the
    end.

    Raises:
        DataError: the run went back to its last checkpoint several times and never got past the bad steps.
        StaleStart: a newer start of the run has taken over.
    """
    recipe, engine = stage.recipe, stage.engine
    stage.watchdog.start()
    while (progress := stage.progress).step < recipe.steps:
        if progress.step in progress.passed_over:
            progress.step += 1
            continue
        started = time.monotonic()
        batch = stage.loader.step(progress.step)
        data_wait = time.monotonic() - started

        losses = StepLosses(recipe.loss, batch.counts, stage.ranks, engine.device)
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
            stage.stop.asked,
            stage.clock_says_save(),
            stage.checkpoints.saving,
        )
        means = losses.means(report.sums)
        reason = stage.guard.verdict(means["loss"], report.norm)
        lr = learning_rate(recipe.optimizer, recipe.steps, progress.step)
        if reason is None:
            engine.step(lr)
            stage.average_weights()
            stage.guard.taken(means["loss"], report.norm)
        else:
            engine.discard_gradient()
            stage.note_skip(batch, reason)

        progress.step += 1
        progress.seconds += time.monotonic() - started
        stage.step_done()
        stage.log_step(batch, means, report, lr, time.monotonic() - started, reason)
        if stage.guard.wants_rewind:
            _rewind(stage)
        elif report.stop:
            return _stop(stage)
        elif (report.save or stage.steps_say_save()) and not report.saving:
            stage.save()
    return _finish(stage)


def _rewind(stage: Stage) -> None:
    """Back to the last checkpoint; the steps skipped in a row are passed over from now on."""
    last = stage.progress.step
    bad = range(last - stage.guard.skipped_in_a_row, last)
    stage.rewinds += 1
    if stage.rewinds > stage.recipe.guard.max_rewinds:
        raise DataError(
            f"Steps {bad.start} to {bad.stop - 1} had to be skipped after {stage.rewinds - 1} returns to "
            f"the checkpoint of step {stage.saved_step}, so the cause is not a few bad samples. Their keys "
            f"and the reasons are in {stage.run.events}; look at the data, or lower the learning rate, "
            "before the run is started again."
        )
    passed_over, skipped = stage.progress.passed_over | set(bad), stage.progress.skipped
    stage.restore()
    stage.progress.passed_over, stage.progress.skipped = passed_over, skipped
    stage.guard.skipped_in_a_row = 0
    if stage.metrics is not None:
        stage.metrics.go_back_to(stage.progress.step)
    stage.events.write("rewound", step=last, to_step=stage.progress.step, passed_over=list(bad))
    if stage.rank == 0:
        say(
            f"Back to step {stage.progress.step}; steps {bad.start} to {bad.stop - 1} are passed over from "
            "now on"
        )


def _stop(stage: Stage) -> ExitCode:
    """Save and leave, to be started again."""
    stage.end_steps()
    stage.save()
    stage.checkpoints.wait()
    step = stage.progress.step
    stage.events.write("stopped", step=step, signal=stage.stop.signal)
    if stage.rank == 0:
        say(f"Stopped by {stage.stop.signal} after step {step}: saved. The same command goes on from here.")
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
        say(f"Finished {stage.recipe.steps} steps: the model is in {stage.run.export}")
    return ExitCode.DONE
