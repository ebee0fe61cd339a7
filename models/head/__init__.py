"""Heads that turn hidden states into bits: the diffusion head, and the ablations of the paper's table 13."""

from models.flow_settings import SamplerName
from models.head.ablations import BitwiseHead, TokenHead
from models.head.config import HeadConfig
from models.head.diffusion import DiffusionHead, SolverSteps
from models.head.schedule import draw_times

__all__ = [
    "BitwiseHead",
    "DiffusionHead",
    "HeadConfig",
    "SamplerName",
    "SolverSteps",
    "TokenHead",
    "draw_times",
]
