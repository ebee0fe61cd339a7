"""What a run does about bad steps: the real loop, guard and progress, over a model that is a number."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_stage import make_inputs, write_recipe
from whole_runs import bitdance, events

from foundation.errors import DataError, ExitCode
from foundation.recipes import load_recipe
from trainer import loop
from trainer.agreement import StepReport
from trainer.guard import Guard
from trainer.metrics import EventLog
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder
from trainer.signals import StopFlag
from trainer.stage import Progress, Stage
from trainer.watchdog import Watchdog

NAN = math.nan
Loss = Callable[[int, int], float]


class NumberStage(Stage):
    """A stage whose weights are the number of steps taken; checkpoints are kept in `saved`, by step."""

    def __init__(self, folder: Path, loss: Loss, steps: int, stop_after: int | None, every_steps: int):
        recipe = write_recipe(
            folder, steps=steps, optimizer__warmup_steps=0, checkpoints__every_steps=every_steps
        )
        self.recipe, self.run, self.rank = load_recipe(StageRecipe, recipe), RunFolder(folder), 0
        self.loss, self.stop_after = loss, stop_after
        self.saved: dict[int, Any] = {}
        self.exported: int | None = None
        self.engine: Any = SimpleNamespace(step=self._take, discard_gradient=lambda: None)
        self.plan: Any = SimpleNamespace(step=lambda number: [SimpleNamespace(name=f"128/{number}")])
        self.checkpoints: Any = SimpleNamespace(newest=0, wait=lambda: None)
        self.stop, self.watchdog = StopFlag(), Watchdog(self.recipe.watchdog)
        self.events = EventLog(self.run, 1, writes=True)
        self.average = self.metrics = None
        self.restore()

    def _take(self, lr: float) -> None:
        self.weights += 1

    def restore(self) -> None:
        empty = (0, Progress(), Guard(self.recipe.guard))
        self.weights, self.progress, self.guard = deepcopy(
            self.saved[max(self.saved)] if self.saved else empty
        )
        self.saved_step = self.progress.step

    def save(self) -> None:
        step = self.saved_step = self.checkpoints.newest = self.progress.step
        self.saved[step] = deepcopy((self.weights, self.progress, self.guard))

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        yield

    def step_done(self) -> None: ...

    def end_steps(self) -> None: ...

    def log_step(self, *line: object) -> None: ...

    def gradient(self, number: int) -> tuple[Any, dict[str, float], StepReport]:
        if number == self.stop_after:
            self.stop.signal = "SIGTERM"
        report = StepReport(torch.zeros(0), 1.0, 0.0, 0.0, self.stop.asked, save=False, saving=False)
        return SimpleNamespace(step=number), {"loss": self.loss(number, self.weights)}, report


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NumberStage]:
    def finish(stage: NumberStage) -> ExitCode:
        stage.exported = stage.weights
        return ExitCode.DONE

    monkeypatch.setattr(loop, "_gradient", lambda stage, number: stage.gradient(number))
    monkeypatch.setattr(loop, "_finish", finish)

    def make(loss: Loss, steps: int = 24, stop_after: int | None = None, every_steps: int = 4) -> NumberStage:
        return NumberStage(tmp_path, loss, steps, stop_after, every_steps)

    return make


def told(stage: Stage, name: str) -> list[dict]:
    lines = [json.loads(line) for line in stage.run.events.read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize("every_steps", [1, 4])
@pytest.mark.parametrize("good", [0, 1, 5])
def test_weights_that_stay_bad_end_the_run(
    begin: Callable[..., NumberStage], good: int, every_steps: int
) -> None:
    stage = begin(lambda step, weights: 1.0 if weights <= good else NAN, every_steps=every_steps)
    with pytest.raises(
        DataError, match=r"after 3 returns to the last checkpoint.*samples by class and number"
    ):
        loop.train(stage)
    assert len(told(stage, "rewound")) == stage.recipe.guard.max_rewinds == 3
    # Saved was only what a step had gone well with, or had led to.
    assert all(step <= good + 1 for step in stage.saved)
    assert stage.exported is None


@pytest.mark.parametrize("every_steps", [4, 16])
def test_any_number_of_bad_stretches_is_passed_over_with_good_steps_between(
    begin: Callable[..., NumberStage], every_steps: int
) -> None:
    bad = {step for step in range(2, 60) if step % 8 in (0, 1, 2, 5)}
    stage = begin(lambda step, weights: NAN if step in bad else 1.0, steps=62, every_steps=every_steps)
    assert loop.train(stage) == ExitCode.DONE
    assert stage.exported == 62 - len(bad)
    assert len(told(stage, "rewound")) > stage.recipe.guard.max_rewinds
    assert sorted(skip["step"] for skip in stage.progress.skipped) == sorted(bad)  # each once
    for step, (weights, progress, guard) in stage.saved.items():
        assert guard.skipped_in_a_row == 0
        assert weights == sum(number not in bad for number in range(step))
        assert progress.passed_over <= bad


def test_a_bad_end_is_exported_only_where_its_samples_were_to_blame(
    begin: Callable[..., NumberStage],
) -> None:
    of_samples = begin(lambda step, weights: NAN if step in (22, 23) else 1.0)
    assert loop.train(of_samples) == ExitCode.DONE and of_samples.exported == 22
    for last_good in (21, 20):  # two bad steps at the end; three, which the run goes back from
        of_weights = begin(lambda step, weights, last=last_good: NAN if weights > last else 1.0)
        with pytest.raises(
            DataError, match=r"so would the 3 after them \(the loss is nan\): nothing is exported"
        ):
            loop.train(of_weights)
        assert of_weights.exported is None


def test_a_stop_between_bad_steps_saves_nothing_and_says_so(
    begin: Callable[..., NumberStage], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = begin(lambda step, weights: NAN if step == 10 else 1.0, stop_after=10)
    assert loop.train(stage) == ExitCode.REQUEUE
    assert max(stage.saved) == 8
    assert (
        "after step 11: NOT SAVED (the last steps were skipped). The same command goes on from step 8."
        in (capsys.readouterr().out)
    )
    stage = begin(lambda step, weights: NAN if step == 10 else 1.0, stop_after=11)
    assert loop.train(stage) == ExitCode.REQUEUE
    assert max(stage.saved) == 12 and "after step 12: saved." in capsys.readouterr().out


def test_a_stop_that_cannot_save_says_so(
    begin: Callable[..., NumberStage], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = begin(lambda step, weights: 1.0, stop_after=9)
    monkeypatch.setattr(NumberStage, "save", lambda self: None)  # a full disk
    assert loop.train(stage) == ExitCode.REQUEUE
    assert "after step 10: NOT SAVED (the save failed). The same command goes on from step 0." in (
        capsys.readouterr().out
    )
    (stopped,) = told(stage, "stopped")
    assert (stopped["step"], stopped["saved"]) == (10, 0)


@pytest.mark.long
def test_a_learning_rate_that_breaks_the_weights_ends_the_run_for_real(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    optimizer = {"lr": 1e30, "warmup_steps": 0}
    recipe = write_recipe(tmp_path, steps=24, optimizer=optimizer, checkpoints__every_steps=4)
    done = bitdance("train", str(recipe))
    assert done.returncode == 65 and "after 3 returns to the last checkpoint" in done.stdout, done.stdout
    assert len(events(tmp_path / "run", "rewound")) == 3
    assert not (tmp_path / "run" / "export").exists()
