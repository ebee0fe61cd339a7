"""How pictures are sampled unless somebody says otherwise. Imports nothing heavy: commands start with it."""

import reprlib
from typing import Literal, NamedTuple, get_args

from models.checks import is_count, is_finite

SamplerName = Literal["euler_maruyama", "euler"]


class FlowSettings(NamedTuple):
    """How the head draws a patch; see `DiffusionHead.sample`."""

    guidance: float = 7.5
    """Scale of classifier-free guidance, at least 1, which switches it off and halves the work."""
    steps: int = 50
    """Solver steps per patch, before the last one; 10 to 50 are useful."""
    sampler: SamplerName = "euler_maruyama"

    def problems(self) -> list[str]:
        """A line for each setting that nothing can be drawn with."""
        problems = []
        if not (is_finite(self.guidance) and self.guidance >= 1.0):
            found = reprlib.repr(self.guidance)
            problems.append(f"guidance is {found}: expected a number of at least 1; 1 switches it off")
        if not is_count(self.steps):
            found = reprlib.repr(self.steps)
            problems.append(f"steps is {found}: expected a whole number of at least 1; 10 to 50 are useful")
        if self.sampler not in get_args(SamplerName):
            problems.append(f"sampler is {self.sampler!r}: expected one of {list(get_args(SamplerName))}")
        return problems
