"""All that is known here about DeepSpeed: one ZeRO-sharded module with AdamW, as the training loop sees it.

Seen with DeepSpeed 0.19 and dealt with in this file, so that nothing else has to know:

- its first start on a CPU compiles a shared-memory collective for half a minute: not offered to it;
- casting a module to bfloat16 casts its buffers too (rotary frequencies lose 16 bits): they are put back;
- its own checkpoints and its overflow check are not used: state is read and written as `Fragment`s, which any
  number of ranks and any ZeRO stage can cut anew, and a step is guarded before the optimizer moves;
- a parameter without a gradient in a step's first micro-batch keeps the gradient of the step before (stage
  3): every micro-batch must give every parameter a gradient, if only zeros.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.recipe import OptimizerSection, ZeroSection

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def start_distributed(extensions_folder: Path) -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Args:
        extensions_folder: where this run's own compiled extensions go; builds of two jobs collide in a shared
            one.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives under names that torch 2.13 has new ones for, and each call would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
    )


def stop_distributed() -> None:
    """Leave the process group; without this, now and then a process aborts at its exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def training_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's flat elements whose float32 state lives on this rank.

    Attributes:
        name: the parameter's name in the module.
        size: elements of the whole parameter.
        start: first element of this run.
        states: per kind, float32 [n] views of the master weights and of Adam's two moments.
    """

    name: str
    size: int
    start: int
    states: dict[Kind, Tensor]

    @property
    def length(self) -> int:
        return self.states["master"].numel()


class Engine:
    """A module under ZeRO: forward, backward, one number for the gradient, then a step or none."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerSection,
        zero: ZeroSection,
        precision: Literal["float32", "bfloat16"],
    ):
        import deepspeed

        self.stage = zero.stage
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        adam = torch.optim.AdamW(
            self.parameters.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=adam, config=_deepspeed_config(zero, precision, optimizer.clip)
        )
        self._adam = adam
        for name, buffer in buffers.items():
            module.get_buffer(name).data = buffer.to(module.get_buffer(name).device)
        self._flat_masters = self._find_flat_masters()
        self._allocate_moments()

    # --- one step -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return torch.device(self._engine.device)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add one micro-batch's gradient; on the step's ``last`` one, gradients are averaged over the
        ranks.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def squared_gradient_norm(self) -> Tensor:
        """This rank's part of the squared L2 norm of the step's gradient, float32 scalar.

        Summed over all ranks it is the whole; it is infinite or NaN where any gradient is. To be called after
        the last backward and before `step` or `discard_gradient`.
        """
        gradients = [g for g in self._local_gradients() if g is not None and g.numel()]
        if not gradients:
            return torch.zeros((), device=self.device)
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        # In stage 0 every rank holds the whole gradient, so each contributes its share of the one sum.
        return norms.square().sum() / (dist.get_world_size() if self.stage == 0 else 1)

    def step(self, lr: float) -> None:
        """Clip the gradient, move the weights, forget the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard_gradient(self) -> None:
        """Forget the step's gradient; weights, moments and Adam's step count stay as they are."""
        if self.stage == 0:
            self._engine.zero_grad()
        else:
            self._optimizer.zero_grad()
            self._optimizer.reset_cpu_buffers()
            # What the engine's own step() leaves behind when it has consumed a gradient.
            for group in list(self._optimizer.averaged_gradients):
                self._optimizer.averaged_gradients[group] = None
            if self.stage in (1, 2):
                self._optimizer.micro_step_id = -1
                for group in list(self._optimizer.all_grad_tensors):
                    self._optimizer.all_grad_tensors[group] = None

    # --- state ----------------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """All float32 state that this rank owns: over all ranks, each element of each parameter once.

        In stage 0, where every rank holds everything, each is given an equal share of every parameter.
        """
        for name in self.parameters:
            fragment = self._fragment(name)
            if fragment is not None:
                yield fragment

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Set all weights from whole tensors, as they stream by; every rank must pass the same ones.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape; all of them are named.
        """
        fragments = {fragment.name: fragment for fragment in self.fragments()}
        wrong, missing = [], set(self.parameters)
        for name, tensor in tensors:
            shape = self.shape(name) if name in self.parameters else None
            if shape != tuple(tensor.shape):
                wrong.append(f"{name} {tuple(tensor.shape)}, expected {shape or 'no such tensor'}")
                continue
            missing.discard(name)
            if self.stage == 0:
                self.parameters[name].data.copy_(tensor)
            elif fragment := fragments.get(name):
                part = tensor.reshape(-1)[fragment.start : fragment.start + fragment.length]
                fragment.states["master"].copy_(part)
        wrong += [f"{name} is missing" for name in sorted(missing)]
        if wrong:
            raise ValueError("the weights do not fit the model: " + "; ".join(wrong))
        self.publish()

    def publish(self) -> None:
        """Make what was written into the fragments what the module computes with (collective)."""
        if self.stage == 3:
            self._optimizer._partition_all_parameters()
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        elif self.stage == 0:
            for master in self._flat_masters:
                for kind in KINDS:
                    _gather_equal_shares(self._state(master, kind))
        else:
            self._publish_stage12()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter, wherever its elements are."""
        parameter: Any = self.parameters[name]
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def whole(self, name: str, values: dict[str, Tensor] | None = None) -> Tensor:
        """One parameter's float32 master weights, whole, on every rank (collective).

        Args:
            values: float32 tensors shaped like this rank's fragments, by name, to assemble in place of the
                masters (an average of the weights, for example).
        """
        fragment = self._fragment(name)
        whole = torch.zeros(math.prod(self.shape(name)), device=self.device)
        if fragment is not None:
            source = fragment.states["master"] if values is None else values[name]
            whole[fragment.start : fragment.start + fragment.length] = source.to(whole.device)
        dist.all_reduce(whole)
        return whole.view(self.shape(name))

    @property
    def optimizer_steps(self) -> int:
        """How often Adam has moved the weights; its bias correction depends on it."""
        return int(next(iter(self._adam.state.values()))["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(count)

    def reset_optimizer(self) -> None:
        """Moments and step count as they are before the first step."""
        for state in self._adam.state.values():
            for value in state.values():
                value.zero_()

    # --- inside ---------------------------------------------------------------------------------------------

    def _find_flat_masters(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        if self.stage == 0:
            return list(self.parameters.values())
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _allocate_moments(self) -> None:
        """Give Adam its state now rather than at its first step, so that it can be loaded and saved at any
        time.
        """
        for master in self._flat_masters:
            self._adam.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _local_gradients(self) -> list[Tensor | None]:
        if self.stage == 0:
            return [parameter.grad for parameter in self.parameters.values()]
        offloaded = self._optimizer.offload_optimizer if self.stage == 3 else self._optimizer.cpu_offload
        if offloaded:
            return [master.grad for master in self._flat_masters]
        return [g for group in self._optimizer.averaged_gradients.values() for g in group or ()]

    def _fragment(self, name: str) -> Fragment | None:
        parameter = self.parameters[name]
        if self.stage == 3:
            return self._stage3_fragment(name, parameter)
        if self.stage == 0:
            return self._stage0_fragment(name, parameter)
        return _stage12_fragment(name, parameter)

    def _stage3_fragment(self, name: str, parameter: Any) -> Fragment | None:
        """Stage 3 cuts every parameter into equal flat parts, the last ones padded."""
        group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = padded * dist.get_rank()
        length = min(padded, parameter.ds_numel - start)
        if length <= 0:
            return None
        master = self._flat_masters[group]
        states = {kind: self._state(master, kind).narrow(0, offset, length) for kind in KINDS}
        return Fragment(name, parameter.ds_numel, start, states)

    def _stage0_fragment(self, name: str, parameter: Tensor) -> Fragment | None:
        start, length = _equal_share(parameter.numel())
        if length <= 0:
            return None
        states = {kind: self._state(parameter, kind).narrow(0, start, length) for kind in KINDS}
        return Fragment(name, parameter.numel(), start, states)

    def _state(self, master: Tensor, kind: Kind) -> Tensor:
        """Flat view of the masters of one group (in stage 0, one parameter), or of one of their moments."""
        return (master if kind == "master" else self._adam.state[master][kind]).detach().view(-1)

    def _publish_stage12(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer, rank = self._optimizer, dist.get_rank()
        for group, master in enumerate(self._flat_masters):
            optimizer.parallel_partitioned_bit16_groups[group][rank].data.copy_(master.data)
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


def _stage12_fragment(name: str, parameter: Any) -> Fragment | None:
    """Stages 1 and 2 lay all parameters end to end and cut that line into equal parts."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    states: dict[Kind, Tensor] = {
        kind: mapping.get_hp_fragment(None if kind == "master" else kind).detach() for kind in KINDS
    }
    return Fragment(name, parameter.numel(), mapping.lp_fragment_address.start, states)


def _equal_share(size: int) -> tuple[int, int]:
    """(start, length) of this rank's part of ``size`` elements cut as evenly as whole parts allow."""
    share = math.ceil(size / dist.get_world_size())
    start = share * dist.get_rank()
    return start, min(share, size - start)


def _gather_equal_shares(flat: Tensor) -> None:
    """Fill ``flat`` [n], of which each rank holds its equal share, on all ranks."""
    start, length = _equal_share(flat.numel())
    share = torch.zeros(math.ceil(flat.numel() / dist.get_world_size()), device=flat.device)
    if length > 0:
        share[:length] = flat[start : start + length]
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share)
    flat.copy_(torch.cat(shares)[: flat.numel()])


def _deepspeed_config(zero: ZeroSection, precision: str, clip: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop says itself which micro-batch is a step's last
        "gradient_clipping": clip,
        "zero_optimization": zero.model_dump(exclude_none=True),
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bfloat16"},
    }
    if precision == "bfloat16" and zero.stage >= 2:
        # Micro-batches add up in float32. (In stage 1 that would select another, older optimizer class.)
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
