"""Tokens per second, MFU and peak memory of training on one GPU, against what `bitdance plan` predicts.

    python benchmarks/train_gpu.py [--backbone 1.7b] [--max-tokens 24576] [--batch 64] [--steps 8]
    python benchmarks/train_gpu.py --tiny            the same code on a CPU, at a size that takes seconds

A backbone with its head (six blocks as wide as it) on packs of the PT mix: bfloat16 with float32 gradients,
master weights and moments, activation checkpointing, FlexAttention on a GPU. The states are those of ZeRO-2
on one rank, kept by plain torch, so that nothing but torch and transformers has to be there. MFU counts
forward and backward without recomputation, over the GPU's dense bfloat16 peak (`trainer/plan/gpus.py`).
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script, from wherever
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.made_up_packs import made_up_packs
from benchmarks.small_models import small_text_to_image
from data_pipeline.batch_recipe import BatchRecipe
from models.backbone import fuse_kernels, why_not_fused
from models.text_to_image import TextToImageConfig, TextToImageModel, preset
from trainer.plan.activations import PackShape, activation_bytes
from trainer.plan.gpus import FRAGMENTATION, find_gpu
from trainer.plan.states import count_parameters, state_bytes, step_bytes
from trainer.recipe import ZeroSection

WARM_UP = 2  # steps: kernels are compiled
ZERO = ZeroSection(stage=2)


class Trainer:
    """A model in bfloat16, its gradients summed in float32, and AdamW on float32 master weights."""

    def __init__(self, config: TextToImageConfig, device: str):
        ordinary = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self.model = TextToImageModel(config)
        torch.set_default_dtype(ordinary)
        self.model.train().enable_activation_checkpointing()
        lacking = why_not_fused(torch.device(device).type)
        print(f"norms and SwiGLU by {'Liger' if lacking is None else f'torch ({lacking})'}")
        if lacking is None:
            fuse_kernels(self.model.llm)
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(lambda w, m=master: self._add(w, m))
        self.adam = torch.optim.AdamW(self.masters, lr=1e-4, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)

    def step(self, packs: list) -> float:
        """One optimizer step over all packs; the summed loss."""
        total = 0.0
        for pack in packs:
            losses = self.model(pack.to(self.masters[0].device))
            loss = (losses.vision.sum() + 0.01 * losses.text.sum()) / 1e4
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.data.copy_(master)
            assert master.grad is not None
            master.grad.zero_()
        return total

    @staticmethod
    def _add(weight: Tensor, master: Tensor) -> None:
        assert master.grad is not None and weight.grad is not None
        master.grad += weight.grad
        weight.grad = None


def planned_bytes(config: TextToImageConfig, packs: list) -> int:
    """Tensors at the peak, and what the allocator cannot reuse, as the plan has them."""
    parameters = count_parameters(config)
    states = state_bytes(parameters, ZERO, "bfloat16", 1, average=False).device
    shapes = [
        PackShape(len(p.input_ids), p.target_bits.shape[0] * config.p**2, len(p.text_at)) for p in packs
    ]
    largest = (max(shapes, key=lambda s: s.tokens), max(shapes, key=lambda s: s.text_targets))
    activations = activation_bytes(config, largest, torch.bfloat16, checkpointing=True).peak
    return int((1 + FRAGMENTATION) * (states + max(activations, step_bytes(parameters, ZERO, 1))))


def main(config: TextToImageConfig, recipe: BatchRecipe, steps: int, gpu: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer, seconds, tokens, flops, widest = Trainer(config, device), 0.0, 0, 0.0, []
    for number in range(WARM_UP + steps):
        packs, work = made_up_packs(config, recipe, number)
        widest = max(widest, packs, key=lambda some: max((len(p.input_ids) for p in some), default=0))
        started = time.perf_counter()
        loss = trainer.step(packs)
        if device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - started
        count = sum(len(pack.input_ids) for pack in packs)
        print(f"step {number}: {len(packs)} packs, {count} tokens, loss {loss:.4f}, {took:.2f} s", flush=True)
        if number >= WARM_UP:
            seconds, tokens, flops = seconds + took, tokens + count, flops + work
    planned = planned_bytes(config, widest)
    print(f"{tokens / seconds:,.0f} tokens/s, {flops / seconds / 1e12:.3g} TFLOP/s on {device}")
    print(f"planned peak {planned / 2**30:.2f} GiB")
    if device == "cuda":
        held = torch.cuda.max_memory_reserved()
        peak = find_gpu(gpu).peak_flops
        print(f"held {held / 2**30:.2f} GiB, planned / held {planned / held:.3f}")
        print(f"MFU {flops / seconds / peak:.1%} of {gpu}'s {peak / 1e12:.0f} TFLOP/s")
    else:
        print("MFU and held memory: not measured, there is no GPU here")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="1.7b")
    parser.add_argument("--max-tokens", type=int, default=24576)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gpu", default="h100-80g")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    mix = BatchRecipe(
        global_batch_size=8 if options.tiny else options.batch,
        ratio={256: 1} if options.tiny else {256: 2, 512: 7, 1024: 1},
        max_tokens=2048 if options.tiny else options.max_tokens,
    )
    tiny = small_text_to_image(vocabulary=1024, width=128, layers=2, heads=2, head_blocks=2)
    size = tiny if options.tiny else preset(options.backbone, 4)
    main(size, mix, options.steps, options.gpu)
