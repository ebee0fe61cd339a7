"""Where the time of a training step goes besides forward, backward and optimizer; the guard's share of it.

    python benchmarks/step_overhead.py [--steps 40]

The real loop (`trainer/loop.py`) on one CPU rank, with a model of some millions of parameters on latents of
random bits; each part is timed by a wrapper around the method that does it. `guard` is the gradient's norm,
the ranks' one collective and the verdict; `data` what the loop waits for packs that are prefetched.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "trainer"))

from small_stage import make_inputs, write_recipe  # the tests' maker of small datasets

WARM_UP = 5
BACKBONE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
NECESSARY = ("forward", "backward", "optimizer")


class Stopwatch:
    """Seconds by part; a part that is timed inside another counts for both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """From now on the time of ``owner.name`` counts for ``part``."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments, **keywords)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)


def measure(folder: Path, steps: int) -> dict[str, float]:
    """Seconds of each part, and "step" for all, over the steps after the warm-up."""
    import trainer.loop
    from data_pipeline.loader import StepLoader
    from foundation.recipes import load_recipe
    from trainer.engine import Engine
    from trainer.guard import Guard
    from trainer.rank import run_rank
    from trainer.recipe import StageRecipe
    from trainer.signals import StopFlag
    from trainer.stage import Stage

    make_inputs(folder, bits=32, samples={128: 64, 256: 64})
    path = write_recipe(
        folder,
        steps=steps,
        model__random__backbone=BACKBONE,
        model__head={"width": 256, "depth": 4, "adaln": 2},
        data__global_batch_size=16,
        data__max_tokens=4096,
        zero={"stage": 1},
    )
    watch = Stopwatch()
    watch.wrap(Engine, "__call__", "forward")
    watch.wrap(Engine, "backward", "backward")
    watch.wrap(Engine, "step", "optimizer")
    watch.wrap(Engine, "squared_gradient_norm", "guard")
    watch.wrap(trainer.loop, "gather_report", "guard")
    watch.wrap(Guard, "verdict", "guard")
    watch.wrap(Guard, "taken", "guard")
    watch.wrap(StepLoader, "step", "data")
    watch.wrap(Stage, "log_step", "log")
    begun: list[float] = []
    logged = Stage.log_step

    def after_step(stage: Stage, *arguments: Any) -> None:
        logged(stage, *arguments)
        if stage.progress.step == WARM_UP:
            watch.seconds.clear()
        if stage.progress.step in (WARM_UP, steps):
            begun.append(time.perf_counter())
        if stage.progress.step == steps:
            watch.seconds["step"] = begun[1] - begun[0]
            parts.update(watch.seconds)

    parts: dict[str, float] = {}
    Stage.log_step = after_step  # type: ignore[method-assign]
    code = run_rank(load_recipe(StageRecipe, path), StopFlag(), False)
    assert code == 0, f"the run ended with {code}"
    return {part: seconds / (steps - WARM_UP) for part, seconds in parts.items()}


def main(steps: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = "29" + str(os.getpid())[-3:].zfill(3)
    with tempfile.TemporaryDirectory(prefix="step-overhead-") as folder:
        out = os.fdopen(os.dup(1), "w")  # the run sends this process's output to its log
        parts = measure(Path(folder), steps)
    step = parts.pop("step")
    parts["rest"] = step - sum(parts.values())
    print(f"{steps - WARM_UP} steps, prefetch on: {1e3 * step:.1f} ms a step", file=out)
    for part, seconds in parts.items():
        print(f"  {part:<10}{1e3 * seconds:9.2f} ms  {seconds / step:7.2%}", file=out)
    outside = step - sum(parts[part] for part in NECESSARY)
    print(f"outside forward, backward and optimizer: {outside / step:.2%}", file=out)
    print(f"of it the guard: {parts['guard'] / step:.2%}", file=out, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
