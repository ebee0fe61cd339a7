"""How pictures are sampled unless somebody says otherwise. Imports nothing heavy: commands start with it."""

from typing import Literal, NamedTuple

SamplerName = Literal["euler_maruyama", "euler"]


class FlowSettings(NamedTuple):
    """How the head draws a patch; see `DiffusionHead.sample`."""

    guidance: float = 7.5
    """Scale of classifier-free guidance, at least 1, which switches it off and halves the work."""
    steps: int = 50
    """Solver steps per patch, before the last one; 10 to 50 are useful."""
    sampler: SamplerName = "euler_maruyama"
