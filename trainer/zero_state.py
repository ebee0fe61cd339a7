"""Where the float32 state of each parameter lives under each stage of ZeRO, and how to reach it.

Stage 0 keeps everything on every rank. Stages 1 and 2 lay all parameters end to end and cut that line into
equal parts. Stage 3 cuts each parameter into equal parts. Seen from here, all are `Fragment`s: runs of flat
parameters, which any other number of ranks and any other stage can cut anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.mapped_memory import MappedMemory

Kind = Literal["master", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")


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


class ZeroState:
    """The float32 master weights and Adam's moments of a sharded module, as this rank has them.

    Parameters that are not trained have neither; they stay in the precision that is computed with.
    """

    def __init__(
        self,
        stage: int,
        parameters: dict[str, nn.Parameter],
        frozen: dict[str, nn.Parameter],
        optimizer: Any,
        adam: torch.optim.AdamW,
        device: torch.device,
        memory: MappedMemory | None = None,
    ):
        """
        Args:
            stage: of ZeRO.
            parameters: those that are trained, by name.
            frozen: the others.
            optimizer: DeepSpeed's wrapper of ``adam``.
            adam: before its first step.
            device: where the module computes.
            memory: where masters and moments go, in stage 3; null: where DeepSpeed has put the masters.
        """
        self.stage, self.parameters, self.frozen, self.device = stage, parameters, frozen, device
        self._optimizer, self._adam = optimizer, adam
        self.flat_masters = self._find_flat_masters()
        if memory is not None:
            memory.move(self.flat_masters)
        self._allocate_moments(torch.zeros_like if memory is None else memory.zeros_like)

    def fragments(self) -> Iterator[Fragment]:
        """All float32 state that this rank owns: over all ranks, each element of each parameter once.

        In stage 0, where every rank holds everything, each is given an equal share of every parameter.
        """
        for name in self.parameters:
            fragment = self._fragment(name)
            if fragment is not None:
                yield fragment

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], only_frozen: bool = False) -> None:
        """Set all weights from whole tensors, as they stream by; every rank must pass the same ones.

        Args:
            only_frozen: leave those that are trained as they are.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape; all of them are named.
        """
        fragments = {fragment.name: fragment for fragment in self.fragments()}
        wrong, missing = [], self.parameters.keys() | self.frozen.keys()
        for name, tensor in tensors:
            shape = self.shape(name) if name in self.parameters or name in self.frozen else None
            if shape != tuple(tensor.shape):
                wrong.append(f"{name} {tuple(tensor.shape)}, expected {shape or 'no such tensor'}")
                continue
            missing.discard(name)
            if name in self.frozen:
                self._load_frozen(self.frozen[name], tensor)
            elif only_frozen:
                continue
            elif self.stage == 0:
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
            everything: list[Any] = [*self.parameters.values(), *self.frozen.values()]
            for parameter in everything:
                parameter.ds_secondary_tensor = (
                    None  # the copy of zero_hpz_partition_size, of the old weights
                )
            self._optimizer._partition_all_parameters()
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        elif self.stage == 0:
            for master in self.flat_masters:
                for kind in KINDS:
                    _gather_equal_shares(self._state(master, kind))
        else:
            self._publish_stage12()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter, wherever its elements are."""
        parameter: Any = self.parameters[name] if name in self.parameters else self.frozen[name]
        return tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def whole(self, name: str, values: dict[str, Tensor] | None = None) -> Tensor:
        """One parameter's float32 master weights, whole, on every rank (collective); of one that is not
        trained, its weights as they are, without a copy where they are whole already.

        Args:
            values: float32 tensors shaped like this rank's fragments, by name, to assemble in place of the
                masters (an average of the weights, for example).
        """
        if name in self.frozen:
            return self._whole_frozen(self.frozen[name])
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

    def move_weights(self, memory: MappedMemory) -> None:
        """Put what stage 3 keeps of the weights in host memory (it is offloaded there) into ``memory``."""
        optimizer = self._optimizer
        everything: list[Any] = [*self.parameters.values(), *self.frozen.values()]
        flat = [*optimizer.param_groups_fp16_flat_cpu_memory, *optimizer.fp16_partitioned_groups_flat]
        memory.move([*flat, *(parameter.ds_tensor for parameter in everything)])

    # --- inside ---------------------------------------------------------------------------------------

    def _find_flat_masters(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        if self.stage == 0:
            return list(self.parameters.values())
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _allocate_moments(self, zeros_like: Callable[[Tensor], Tensor]) -> None:
        """Give Adam its state now rather than at its first step, so that it can be loaded and saved at any
        time.
        """
        for master in self.flat_masters:
            self._adam.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": zeros_like(master.detach()),
                "exp_avg_sq": zeros_like(master.detach()),
            }
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _load_frozen(self, parameter: Any, values: Tensor) -> None:
        if self.stage != 3:
            parameter.data.copy_(values)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(values)

    def _whole_frozen(self, parameter: Any) -> Tensor:
        if self.stage != 3:
            return parameter.data
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.data.clone()

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
        master = self.flat_masters[group]
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
        for group, master in enumerate(self.flat_masters):
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
