"""One default of sampling, wherever it is asked for, and commands that start without torch for it."""

import subprocess
import sys

from evaluation.recipes import Sampling
from models.flow_settings import FlowSettings
from trainer.recipe import SamplesSection


def test_every_recipe_has_the_defaults() -> None:
    sampling = Sampling()
    assert FlowSettings(sampling.guidance, sampling.steps, sampling.sampler) == FlowSettings()
    samples = SamplesSection(every_steps=1, prompts=["a"], size=(256, 256))
    assert (samples.guidance, samples.steps) == FlowSettings()[:2]


def test_the_command_has_the_defaults_and_loads_no_torch() -> None:
    code = (
        "import inspect, sys; from evaluation.cli import generate; "
        "p = inspect.signature(generate).parameters; assert 'torch' not in sys.modules; "
        "print(tuple(p[name].default for name in ('guidance', 'steps', 'sampler')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tuple(FlowSettings()))
