"""Rectified flow on bits as points of {-1, +1}^C: t = 0 is noise, t = 1 is data.

N groups, P tokens per group, C bits. Sources: the paper's binary diffusion head (arXiv 2602.14041), rectified
flow (arXiv 2209.03003), guidance (arXiv 2207.12598); the clamp at 0.05 is the published code's.

The net predicts the data x; training and sampling work with velocities, and both divide by the same clamped
1 - t.
Everything here is float32: callers keep it outside autocast.
"""

from __future__ import annotations

import reprlib

import torch
from torch import Tensor

MIN_DENOMINATOR = 0.05


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t x + (1 - t) noise. x and noise `[N, P, C]`, t `[N]` in [0, 1] -> `[N, P, C]`; float32."""
    t = t.view(-1, 1, 1)
    return t * x + (1.0 - t) * noise


def velocity(x: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """(x - x_t) / max(1 - t, 0.05), for a target x or a predicted one.

    x, x_t float32 `[N, P, C]`, t in [0, 1], one number or float32 `[N]` -> float32 `[N, P, C]`.
    """
    if isinstance(t, Tensor):
        return (x - x_t) / (1.0 - t.view(-1, 1, 1)).clamp_min(MIN_DENOMINATOR)
    return (x - x_t) / max(1.0 - t, MIN_DENOMINATOR)


def velocity_loss(predicted: Tensor, target: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Velocity matching: mean over bits of (v - v_predicted)^2, float32 `[N, P]`.

    predicted `[N, P, C]` of any float dtype; target, x_t float32 `[N, P, C]`; t float32 `[N]` in [0, 1].
    """
    difference = velocity(target, x_t, t) - velocity(predicted.float(), x_t, t)
    return difference.square().mean(dim=-1)


def guided(v: Tensor, guidance: float) -> Tensor:
    """v_u + guidance (v_c - v_u): float32 `[2N, P, C]`, conditional half first -> `[N, P, C]`."""
    conditional, unconditional = v.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def wrong_generator(generator: object) -> list[str]:
    """A line where ``generator`` is nothing to draw from: a bare seed, above all."""
    if generator is None or isinstance(generator, torch.Generator):
        return []
    found = reprlib.repr(generator)
    return [
        f"generator is {found}: expected a torch.Generator or None; "
        "of a seed make torch.Generator(device).manual_seed(seed)"
    ]


def draw_noise(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Standard normal float32 `[*shape]` on `device`.

    Drawn by `generator` where it lives, or by the device's global one.
    """
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
