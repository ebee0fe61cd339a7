"""Liger's kernels in the backbone: when they can be had, that nothing else changes, and parity on a GPU."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

from models.backbone import build_backbone, fuse_kernels, fused, plan_packed, run_backbone, why_not_fused

CONFIG = Qwen3Config(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)


@pytest.mark.parametrize(
    ("device", "installed", "reason"),
    [
        ("cuda", True, None),
        ("cuda", False, "liger-kernel is not installed"),
        ("cpu", True, "no GPU"),
        ("cpu", False, "no GPU"),
    ],
)
def test_they_need_a_gpu_and_the_package(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: bool, reason: str | None
) -> None:
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert why_not_fused(device) == reason


def test_only_norms_and_swiglu_of_this_model_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that does what Liger's function does besides: it exchanges classes."""
    asked: list[dict[str, Any]] = []

    def apply(**options: Any) -> None:
        asked.append(options)
        modeling_qwen3.Qwen3RMSNorm = modeling_qwen3.Qwen3MLP = nn.Identity  # type: ignore[misc, assignment]

    stand_in = SimpleNamespace(apply_liger_kernel_to_qwen3=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())  # type: ignore[arg-type]
    before = modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3MLP
    llm = build_backbone(CONFIG)
    fuse_kernels(llm)
    (options,) = asked
    assert options.pop("model") is llm
    assert {name for name, chosen in options.items() if chosen} == {"rms_norm", "swiglu"}
    assert set(options) >= {
        "rope",
        "cross_entropy",
        "fused_linear_cross_entropy",
    }  # some default to on
    assert (modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3MLP) == before


def outputs_and_gradients(llm: Qwen3ForCausalLM, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings, weights = torch.randn(2, 1, 48, CONFIG.hidden_size, generator=generator).to(device)
    places = torch.arange(48, device=device)
    plan = plan_packed(places // 24, torch.full_like(places, -1), "dense")
    hidden = run_backbone(llm, embeddings.requires_grad_(), places[None] % 24, plan)
    parameters = [embeddings, *llm.model.layers.parameters(), *llm.model.norm.parameters()]
    return [hidden, *torch.autograd.grad((hidden * weights).sum(), parameters)]


MISSING = why_not_fused("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_parity_with_torch() -> None:
    """Hidden states and every gradient in float32, to 1e-4 of the largest."""
    torch.manual_seed(0)
    llm = build_backbone(CONFIG).to("cuda")
    expected = outputs_and_gradients(llm, "cuda")
    fuse_kernels(llm)
    assert "Liger" in repr(llm.model.norm)
    for found, wanted in zip(outputs_and_gradients(llm, "cuda"), expected, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
