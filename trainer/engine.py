"""All that is known here about DeepSpeed: one ZeRO-sharded module with AdamW, as the training loop sees it.

Seen with DeepSpeed 0.19 and dealt with in this file, so that nothing else has to know:

- its first start on a CPU compiles a shared-memory collective for half a minute: not offered to it;
- casting a module to bfloat16 casts its buffers too (rotary frequencies lose 16 bits): they are put back;
- its own checkpoints and its overflow check are not used: state is read and written as `Fragment`s, which any
  number of ranks and any ZeRO stage can cut anew, and a step is guarded before the optimizer moves;
- what it swaps to NVMe cannot be saved or guarded: it is told to offload to host memory, which then is mapped
  from files on the disk (`mapped_memory`);
- a parameter without a gradient in a step's first micro-batch keeps the gradient of the step before (stage
  3): every micro-batch must give every parameter a gradient, if only zeros.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from models.exchange import exchanged
from trainer.mapped_memory import MappedMemory
from trainer.peers import refuse_shared_gpus
from trainer.recipe import OffloadSection, OptimizerSection, ZeroSection
from trainer.watchdog import LEAVE_SECONDS, UNHURRIED_SECONDS
from trainer.zero_state import ZeroState

M = TypeVar("M", bound=nn.Module)


def start_distributed() -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Raises:
        RecipeError: on all ranks, where some would share a GPU.
    """
    device = training_device()
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it looks for one, and warns where it finds none
    deepspeed = _import_deepspeed()
    deepspeed.ops.__compatible_ops__ = {}  # asked for that collective alone; to fill it runs compilers
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives under names that torch 2.13 has new ones for, and each call would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed takes the group that is there. Its own would be given a device, and so connect the GPUs before
    # anybody has looked whose they are, by numbers that are not the process's where srun shows it one alone.
    dist.init_process_group(backend, timeout=timedelta(seconds=UNHURRIED_SECONDS + LEAVE_SECONDS))
    if device.type == "cuda":
        refuse_shared_gpus(socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def training_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none. srun may show each rank its own GPU alone."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def build_module(
    build: Callable[[], M],
    tie: Callable[[M], object],
    zero: ZeroSection,
    precision: Literal["float32", "bfloat16"],
) -> M:
    """The module that ``build`` makes, its parameters zeros in the precision that is computed with.

    Under stage 3 it is sharded from the start, never whole on any rank. No rank initializes weights: they are
    to be loaded afterwards (`ZeroState.load_weights`).

    Args:
        build: makes the module.
        tie: makes the parameters that are shared in the module shared (again).
    """
    deepspeed = _import_deepspeed()
    config = _deepspeed_config(zero, precision, clip=1.0)
    with init_empty_weights(include_buffers=False):
        module = build()
    tie(module)
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((owner, name))
    for empty, places in owners.items():
        holder = nn.Module()
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        values = torch.zeros(empty.shape, dtype=dtype, device=training_device())
        holder.register_parameter("weight", nn.Parameter(values, requires_grad=empty.requires_grad))
        if zero.stage == 3:
            # The first one makes the groups of zero_hpz_partition_size, which cannot be made twice.
            within = deepspeed.utils.groups._get_zero_param_intra_parallel_group()
            deepspeed.zero.Init(module=holder, config_dict_or_path=config, zero_param_parallel_group=within)
        for owner, name in places:
            owner.register_parameter(name, holder.get_parameter("weight"))
    return module


class Engine:
    """A module under ZeRO: forward, backward, one number for the gradient, then a step or none."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerSection,
        zero: ZeroSection,
        precision: Literal["float32", "bfloat16"],
    ):
        deepspeed = _import_deepspeed()
        self.stage = zero.stage
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        adam = torch.optim.AdamW(
            trained.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            # On a CPU: one pass over the state in place of many, without temporaries.
            fused=True if zero.offload_optimizer or training_device().type == "cpu" else None,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=adam, config=_deepspeed_config(zero, precision, optimizer.clip)
        )
        for name, buffer in buffers.items():
            module.get_buffer(name).data = buffer.to(module.get_buffer(name).device)
        memory, weights_memory = _memory_of(zero.offload_optimizer), _memory_of(zero.offload_param)
        self.state = ZeroState(self.stage, trained, frozen, self._optimizer, adam, self.device, memory)
        if weights_memory is not None:
            self.state.move_weights(weights_memory)
        # DeepSpeed's own beside the world's: most collectives are in those. Groups that are made later, as
        # that of the checkpoints is, have nothing to do with steps.
        self._groups = list(_world.pg_map)
        self.wait_at_most(UNHURRIED_SECONDS)

    def wait_at_most(self, seconds: float) -> None:
        """How long a rank may wait for the others in a collective of training: a little longer than that, so
        that the watchdog comes first, which tells where each rank is.
        """
        for group in self._groups:
            _set_pg_timeout(timedelta(seconds=seconds + LEAVE_SECONDS), group)

    # --- one step -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return torch.device(self._engine.device)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add one micro-batch's gradient; on the step's ``last`` one, average gradients over the ranks."""
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

    def _local_gradients(self) -> list[Tensor | None]:
        if self.stage == 0:
            return [parameter.grad for parameter in self.state.parameters.values()]
        offloaded = self._optimizer.offload_optimizer if self.stage == 3 else self._optimizer.cpu_offload
        if offloaded:
            return [master.grad for master in self.state.flat_masters]
        return [g for group in self._optimizer.averaged_gradients.values() for g in group or ()]


def _import_deepspeed() -> Any:
    """DeepSpeed, without compiling parts of its Muon optimizer: that alone loads torch's compiler."""
    import deepspeed
    import deepspeed.ops

    with exchanged(torch, compile=lambda function=None, **_: function or (lambda inner: inner)):
        import deepspeed.runtime.zero.muon.original_muon
    return deepspeed


def _memory_of(offload: OffloadSection | None) -> MappedMemory | None:
    return MappedMemory(offload.nvme_path) if offload is not None and offload.nvme_path is not None else None


def _deepspeed_config(zero: ZeroSection, precision: str, clip: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the loop says itself which micro-batch is a step's last
        "gradient_clipping": clip,
        "zero_optimization": _zero_config(zero),
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bfloat16"},
    }
    if precision == "bfloat16" and zero.stage >= 2:
        # Micro-batches add up in float32. (In stage 1 that would select another, older optimizer class.)
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _zero_config(zero: ZeroSection) -> dict[str, Any]:
    config: dict[str, Any] = zero.model_dump(exclude_none=True)
    for key in ("offload_optimizer", "offload_param"):
        if key in config:
            config[key] = {"device": "cpu", "pin_memory": config[key]["pin_memory"]}
    return config
