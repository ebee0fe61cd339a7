import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_stage import write_recipe

from foundation.recipes import load_recipe
from trainer import metrics
from trainer.metrics import EventLog, MetricsLog, first_trained, read_lines
from trainer.recipe import StageRecipe
from trainer.run_folder import RunFolder
from trainer.stage import Stage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> StageRecipe:
    return load_recipe(StageRecipe, write_recipe(tmp_path))


class Wandb:
    """What a run uses of W&B."""

    def begin(self, **options: object) -> "Wandb":
        self.asked, self.told, self.gone = options, [], None
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, metrics: dict) -> None:
        if self.gone is not None:
            raise self.gone
        self.told.append(metrics["step"])

    def finish(self) -> None:
        if self.gone is not None:
            raise self.gone


@pytest.fixture
def wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wandb:
    wandb = Wandb()
    monkeypatch.setattr("wandb.init", wandb.begin)
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "0001.json").write_text(json.dumps({"time": 1.0}))
    return wandb


@pytest.mark.parametrize("gone", [ConnectionResetError("Connection lost"), BrokenPipeError(), RuntimeError()])
def test_a_wandb_that_dies_is_said_once_and_done_without(
    tmp_path: Path, wandb_run: Wandb, capsys: pytest.CaptureFixture[str], gone: Exception
) -> None:
    offline = load_recipe(StageRecipe, write_recipe(tmp_path, metrics={"wandb": "offline"}))
    log = MetricsLog(RunFolder(tmp_path), offline, 0)
    log.write({"step": 0})
    log.write({"step": 1})
    log.go_back_to(1)
    log.write({"step": 1})
    assert wandb_run.told == [0, 1, 1]  # its own steps rise on
    wandb_run.gone = gone
    log.write({"step": 2})
    log.write({"step": 3})
    log.close()
    assert capsys.readouterr().out.count("W&B is gone") == 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_wandb_that_does_not_start_is_done_without(
    tmp_path: Path, wandb_run: Wandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: object) -> None:
        raise OSError("no wandb-core")

    monkeypatch.setattr("wandb.init", broken)
    monkeypatch.setattr(metrics, "_wandb_reachable", lambda: True)
    for mode, said in (("offline", "W&B does not start"), ("online", "W&B cannot be used (no wandb-core)")):
        recipe = load_recipe(StageRecipe, write_recipe(tmp_path, metrics={"wandb": mode}))
        MetricsLog(RunFolder(tmp_path), recipe, 0).close()
        assert said in capsys.readouterr().out


def test_a_resume_drops_the_steps_that_are_done_again(tmp_path: Path, recipe: StageRecipe) -> None:
    run = RunFolder(tmp_path)
    first = MetricsLog(run, recipe, 0)
    for step in range(5):
        first.write({"step": step, "loss": 1.0})
    with open(run.metrics, "a") as file:
        file.write('{"loss": 1.0}\n{"step": "x"}\n')  # damaged
        file.write('{"step": 5, "lo')  # cut short by a kill
    second = MetricsLog(run, recipe, 3)
    first.write({"step": 5, "loss": 9.0})  # a stale process writes into the void
    second.write({"step": 3, "loss": 2.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in read_lines(run.metrics)] == [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]


def test_unreachable_wandb_goes_on_offline(
    tmp_path: Path, recipe: StageRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    run.starts.mkdir()
    (run.starts / "0001.json").write_text(json.dumps({"time": 1.0}))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    wandb = Wandb()
    monkeypatch.setattr("wandb.init", wandb.begin)
    online = recipe.model_copy(update={"metrics": recipe.metrics.model_copy(update={"wandb": "online"})})
    MetricsLog(run, online, 0)
    assert wandb.asked["mode"] == "offline"
    assert "cannot be reached" in capsys.readouterr().out


def test_disabled_wandb_is_not_asked(
    tmp_path: Path, recipe: StageRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_wandb_reachable", lambda: pytest.fail("W&B was asked"))
    MetricsLog(RunFolder(tmp_path), recipe, 0).close()


def test_wandb_without_a_login_goes_on_offline_for_real(tmp_path: Path) -> None:
    """W&B itself, in a process without a key, and a server that would be there."""
    write_recipe(tmp_path, metrics={"wandb": "online"})
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "0001.json").write_text(json.dumps({"time": 1.0}))
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        }
        script = (
            "from pathlib import Path; from foundation.recipes import load_recipe\n"
            "from trainer.metrics import MetricsLog; from trainer.recipe import StageRecipe\n"
            "from trainer.run_folder import RunFolder\n"
            "log = MetricsLog(RunFolder(Path('.')), load_recipe(StageRecipe, 'recipe.yaml'), 0)\n"
            "log.write({'step': 0, 'loss': 1.0}); log.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "W&B cannot be used" in done.stdout and "offline" in done.stdout
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_full_disk_ends_no_training(tmp_path: Path) -> None:
    """/dev/full stands for it: the system takes nothing there."""
    run = RunFolder(tmp_path)
    run.events.symlink_to("/dev/full")
    EventLog(run, 1, writes=True).write("saved", step=1)


def test_a_full_disk_turns_no_stop_into_a_failure(
    tmp_path: Path, recipe: StageRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 0}\n{"step": 1}\n')
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "atomic_write", full)
        MetricsLog(run, recipe, 1).close()
    assert "metrics.jsonl still has steps from 1 on" in capsys.readouterr().out
    run.metrics.unlink()
    run.metrics.symlink_to("/dev/full")
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "atomic_write", full)
        patched.setattr(metrics, "read_metrics", lambda path: [])  # it has no end
        log = MetricsLog(run, recipe, 0)
    log.write({"step": 0})
    log.close()


def test_what_cannot_be_closed_keeps_nothing_else_open() -> None:
    closed: list[str] = []

    def part(name: str) -> SimpleNamespace:
        def close() -> None:
            closed.append(name)
            if name == "metrics":
                raise OSError("disk")

        return SimpleNamespace(close=close, stop=close, end_steps=close)

    names = ["terminal", "watchdog", "loader", "sampler", "metrics", "checkpoints"]
    with pytest.raises(OSError, match="disk"):
        Stage.close(SimpleNamespace(**{name: part(name) for name in names}))  # type: ignore[arg-type]
    assert closed == names


def test_the_clock_of_a_run_starts_with_the_first_start_that_trains(tmp_path: Path) -> None:
    """One is refused, one dies while it loads, one trains and is then refused, one is about to train."""
    run = RunFolder(tmp_path)
    run.starts.mkdir()
    records = ({"time": 1.0, "refused": 65}, {"time": 2.0}, {"time": 3.0, "refused": 65}, {"time": 4.0})
    for number, record in enumerate(records, start=1):
        (run.starts / f"{number:04}.json").write_text(json.dumps(record))
        EventLog(run, number, writes=True).write("checkpoint_passed_over", step=1)
        assert first_trained(run) == (record["time"] if number <= 3 else 3.0)
        if number >= 3:
            EventLog(run, number, writes=True).write("started", step=0)
    assert first_trained(run) == 3.0
