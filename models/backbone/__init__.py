"""The autoregressive backbone: Qwen3 with block-causal attention over packed sequences, and its cache."""

from models.backbone.attention import AttentionPlan, Backend, describe_attention, plan_packed
from models.backbone.cache import GenerationCache
from models.backbone.fused import fuse_kernels, why_not_fused
from models.backbone.presets import BACKBONES, backbone_config
from models.backbone.published_config import read_backbone_config
from models.backbone.qwen3 import build_backbone, run_backbone

__all__ = [
    "BACKBONES",
    "AttentionPlan",
    "Backend",
    "GenerationCache",
    "backbone_config",
    "build_backbone",
    "describe_attention",
    "fuse_kernels",
    "plan_packed",
    "read_backbone_config",
    "run_backbone",
    "why_not_fused",
]
