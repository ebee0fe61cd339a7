"""From noise to bits: the solvers of the flow's differential equation.

`euler_maruyama` is the one that the published images were made with; `euler` is the paper's eq. 4.
N groups, P tokens per group, C bits; states and velocities are float32.

Sources: the paper, arXiv 2602.14041; for `euler_maruyama` modeling/vision_head/sampling_x.py of the published
code. Its stochastic equation has the flow's marginals at every t (arXiv 2401.08740).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.flow_settings import FlowSettings, SamplerName
from models.head.flow import draw_noise, guided, velocity, wrong_generator
from models.head.schedule import SamplingTimes

# (state [N, P, C], index of the time) -> predicted data, [N, P, C] or, with guidance, [2N, P, C]
Denoiser = Callable[[Tensor, int], Tensor]


def check_sampling(rows: int, flow: FlowSettings, generator: torch.Generator | None) -> None:
    """Raise ValueError, naming all that is wrong, unless this can be drawn; rows are two halves if guided."""
    problems = [*flow.problems(), *wrong_generator(generator)]
    if not problems and flow.guidance > 1.0 and rows % 2:
        problems.append(
            f"guidance {flow.guidance} needs a conditional and an unconditional half, found {rows} rows; "
            "pass the conditional rows first, then as many unconditional ones"
        )
    if problems:
        raise ValueError("; ".join(problems))


def integrate(
    denoise: Denoiser,
    shape: Sequence[int],
    times: SamplingTimes,
    guidance: float,
    sampler: SamplerName,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """Run the solver from t = 0 to 1; float32 `shape` = `[N, P, C]`, N without the unconditional half.

    Draws, in this order: the start, then (euler_maruyama) one draw of `shape` per step, none for the last.
    """
    shape = tuple(shape)
    x = draw_noise(shape, device, generator)

    def guided_velocity(x: Tensor, index: int, t: float) -> Tensor:
        predicted = denoise(x, index).float()
        if guidance == 1.0:
            return velocity(predicted, x, t)
        # Both halves share x, so only the predictions differ.
        return guided(velocity(predicted, x.repeat(2, 1, 1), t), guidance)

    for index, (t, dt) in enumerate(zip(times.times, times.dts, strict=True)):
        v = guided_velocity(x, index, t)
        if sampler == "euler":
            x = x + v * dt
        else:
            x = euler_maruyama_step(x, v, t, dt, draw_noise(shape, device, generator))
    return x + guided_velocity(x, len(times.times), times.last) * times.last_dt


def euler_maruyama_step(x: Tensor, v: Tensor, t: float, dt: float, noise: Tensor) -> Tensor:
    """One step, of size dt > 0 from t in [0, 1), of the SDE that has the flow's marginals.

    State x, guided velocity v and standard normal noise are float32 `[N, P, C]`, as is the result:
    x + (v + (1-t) score) dt + sqrt(2 (1-t) dt) noise, with score = (t v - x) / ((1-t)^2 + t (1-t)).
    """
    score = (t * v - x) / ((1.0 - t) ** 2 + t * (1.0 - t))
    return x + (v + (1.0 - t) * score) * dt + math.sqrt(2.0 * (1.0 - t) * dt) * noise
