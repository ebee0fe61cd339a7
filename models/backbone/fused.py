"""Liger's fused RMSNorm and SwiGLU (Hsu et al., arXiv 2410.10989) in the place of Qwen3's own, on a GPU.

They compute the same to rounding, and keep less for the backward pass: of a norm its input and a number per
token, of the gated product its two factors.
"""

import importlib
import importlib.util

from transformers import Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from models.exchange import exchanged


def why_not_fused(device_type: str) -> str | None:
    """Why the fused kernels cannot be had on a kind of device; None where they can."""
    if device_type != "cuda":
        return "no GPU"
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def fuse_kernels(llm: Qwen3ForCausalLM) -> None:
    """Have Liger's kernels compute the norms around each layer's parts, the last norm, and the gated product.

    Parameters, their names and adapters over them stay. Positions and losses stay torch's: the model computes
    its text loss in parts already, and only where there is a target.
    """
    liger = importlib.import_module("liger_kernel.transformers")
    # The package also exchanges the classes of models to come; those may be for the CPU, and stay.
    own = {name: getattr(modeling_qwen3, name) for name in ("Qwen3RMSNorm", "Qwen3MLP")}
    with exchanged(modeling_qwen3, **own):
        liger.apply_liger_kernel_to_qwen3(
            model=llm,
            rope=False,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
            rms_norm=True,
            swiglu=True,
        )
