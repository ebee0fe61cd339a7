"""The binary diffusion head: rectified flow on the bits of P tokens, given their hidden states.

Shapes: N groups of tokens, P tokens per group, C bits per token, D width of the condition, W of the head.
Source: the paper's binary diffusion head (arXiv 2602.14041), modeling/vision_head/ of the published code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.flow_settings import FlowSettings, SamplerName
from models.head.config import HeadConfig
from models.head.flow import draw_noise, interpolate, velocity_loss
from models.head.network import HeadNetwork
from models.head.sampler import check_sampling, integrate
from models.head.schedule import SamplingTimes, draw_times, sampling_times


class SolverSteps(NamedTuple):
    """The times of a solver, and what the net makes of them: the same for every patch of a picture."""

    times: SamplingTimes
    embedded: Tensor
    """`[steps + 1, W]` in the dtype of the weights; the last row is that of the last step."""


class DiffusionHead(nn.Module):
    """The joint distribution of the P x C bits of a group; state dict keys `net.*`."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.net = HeadNetwork(config)

    def loss(
        self,
        target: Tensor,
        cond: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Velocity-matching loss of each token, before any reduction over tokens.

        Args:
            target: bits of -1/+1, `[N, P, C]`, any dtype.
            cond: hidden states, `[N, P, D]`, any float dtype.
            t: times in [0, 1], float32 `[k N]`, already shifted (see `draw_times`); drawn here if None.
            noise: standard normal, float32 `[k N, P, C]`; drawn here, after t, if None.
            generator: where the draws come from; torch's global one if None.

        k is `diff_batch_mul`: target and condition are tiled k times, each copy with its own t and noise.

        Returns float32 `[N, P]`: the mean over bits and over the k copies.
        Raises ValueError if shapes do not fit one another or the config.
        """
        k, groups = self.config.diff_batch_mul, target.shape[0]
        self._check_inputs(target, cond, t, noise)
        if t is None:
            t = draw_times(self.config, k * groups, generator, target.device)
        if noise is None:
            noise = draw_noise((k * groups, *target.shape[1:]), target.device, generator)
        with torch.autocast(target.device.type, enabled=False):
            t, noise = t.to(target.device, torch.float32), noise.to(target.device, torch.float32)
            clean = target.float().repeat(k, 1, 1)
            x_t = interpolate(clean, noise, t)
        # The condition is embedded before it is tiled: the same values, a k-th of the work.
        embedded = self.net.embed_condition(cond).repeat(k, 1, 1)
        predicted = self.net.denoise(self.net.embed_tokens(x_t), self.net.time_embed(t)[:, None], embedded)
        with torch.autocast(target.device.type, enabled=False):
            per_copy = velocity_loss(predicted, clean, x_t, t)
        return per_copy.view(k, groups, -1).mean(dim=0)

    @torch.inference_mode()
    def solver_steps(self, steps: int) -> SolverSteps:
        """What `sample` needs to know of `steps` steps. Raises ValueError on fewer than one."""
        times = sampling_times(steps, self.config.time_shift)
        device = self.net.input_proj.weight.device
        with torch.autocast(device.type, enabled=False):
            embedded = self.net.time_embed(torch.tensor([*times.times, times.last], device=device))
        return SolverSteps(times, embedded)

    @torch.inference_mode()
    def sample(
        self,
        cond: Tensor,
        guidance: float = 1.0,
        *,
        steps: int | SolverSteps = 20,
        sampler: SamplerName = "euler_maruyama",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the bits of every group, before hard signs.

        Args:
            cond: hidden states `[N, P, D]`; with guidance > 1 `[2N, P, D]`, the conditional half first.
            guidance: v = v_u + guidance (v_c - v_u), at least 1. At 1 every row has noise of its own.
            steps: solver steps before the last one, 10 to 50 are useful; or what `solver_steps` made of them.
            sampler: "euler_maruyama" (the published images) or "euler" (paper eq. 4).
            generator: where the draws come from; torch's global one of the condition's device if None.

        Returns float32, as many rows as `cond`, `[.., P, C]`; with guidance > 1 the two halves are equal.
        Raises ValueError on a guidance below 1, an odd number of rows with guidance, fewer than one step, an
        unknown sampler, or arguments of another type.
        """
        self._check_condition(cond)
        count = len(steps.times.times) if isinstance(steps, SolverSteps) else steps
        check_sampling(cond.shape[0], FlowSettings(guidance, count, sampler), generator)
        solver = steps if isinstance(steps, SolverSteps) else self.solver_steps(steps)
        halves = 1 if guidance == 1.0 else 2
        with torch.autocast(cond.device.type, enabled=False):
            embedded_cond = self.net.embed_condition(cond)

            def denoise(x: Tensor, index: int) -> Tensor:
                # Both halves hold the same tokens: project one, then repeat.
                tokens = self.net.embed_tokens(x).repeat(halves, 1, 1)
                return self.net.denoise(tokens, solver.embedded[index], embedded_cond)

            shape = (cond.shape[0] // halves, self.config.parallel_num, self.config.ch_target)
            x = integrate(denoise, shape, solver.times, guidance, sampler, generator, cond.device)
        return x.repeat(halves, 1, 1)

    def compile_for_sampling(self) -> None:
        """Compile the net, which runs up to 100 times a patch on few tokens, into one CUDA graph.

        For a head on a GPU that only samples; the first picture waits for the compiler.
        """
        compiled = torch.compile(self.net.denoise, mode="reduce-overhead")
        setattr(self.net, "denoise", compiled)  # noqa: B010 (a method)

    def _check_condition(self, cond: Tensor) -> None:
        expected = (self.config.parallel_num, self.config.ch_cond)
        if not isinstance(cond, Tensor) or not cond.is_floating_point():
            found = cond.dtype if isinstance(cond, Tensor) else type(cond).__name__
            raise ValueError(f"condition of the head: found {found}, expected a tensor of floats")
        if cond.ndim != 3 or tuple(cond.shape[1:]) != expected:
            raise ValueError(
                f"condition of the head: found shape {list(cond.shape)}, expected "
                f"[N, {expected[0]}, {expected[1]}] (tokens per group, width of the backbone)"
            )

    def _check_inputs(self, target: Tensor, cond: Tensor, t: Tensor | None, noise: Tensor | None) -> None:
        self._check_condition(cond)
        groups, copies = cond.shape[0], cond.shape[0] * self.config.diff_batch_mul
        per_group = (self.config.parallel_num, self.config.ch_target)
        expected = {"target": (groups, *per_group), "t": (copies,), "noise": (copies, *per_group)}
        for name, value in (("target", target), ("t", t), ("noise", noise)):
            if value is not None and tuple(value.shape) != expected[name]:
                raise ValueError(
                    f"{name} of the head's loss: found shape {list(value.shape)}, "
                    f"expected {list(expected[name])}"
                )
