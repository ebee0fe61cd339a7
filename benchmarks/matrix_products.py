"""The floor of a computation that is bound by matrix products: the same products, alone.

    with MatrixProducts(model) as products:
        run_the_computation()
    seconds = products.replay()

Every matrix product and convolution is recorded with the weights and shapes it had, and replayed in the same
order, so that caches are as warm or as cold. What the computation does besides (norms, activations, the
solver, random numbers, Python; on a CPU attention too) is what the floor leaves out. Products with packed
weights are replayed as plain ones: the floor is what torch takes without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class MatrixProducts(TorchDispatchMode):
    """Records the products that run inside the `with` block; `flops` counts a multiply-add as two."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        parameters = (parameter for model in models for parameter in model.parameters())
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.calls: list[Call] = []
        self.flops = 0
        self._stand_ins: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in flop_registry:
            # In inference mode composite operators, F.linear above all, arrive whole: take them apart.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if str(packet) == "mkl._mkl_linear":
            x, _packed, weight, bias, _rows = args
            self.flops += 2 * x.numel() * weight.shape[0]
            self.calls.append((F.linear, (self._stand_in(x), weight, bias), {}))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            self.calls.append((func, tuple(self._stand_in(arg) for arg in args), kwargs))
        return out

    def _stand_in(self, value: Any) -> Any:
        """A random tensor per shape in the place of an activation; weights and all else stay as they are."""
        if not isinstance(value, Tensor) or value.untyped_storage().data_ptr() in self._weights:
            return value
        key = (tuple(value.shape), value.stride(), value.dtype, value.device)
        if key not in self._stand_ins:
            self._stand_ins[key] = torch.randn_like(value)
        return self._stand_ins[key]

    @torch.inference_mode()
    def replay(self) -> float:
        """Seconds that the recorded products take by themselves."""
        _synchronize()
        start = time.perf_counter()
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)
        _synchronize()
        return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
