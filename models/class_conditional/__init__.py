"""Class-conditional BitDance: ImageNet models that predict 1, 4 or 16 binary tokens per step."""

from models.class_conditional.config import (
    CLASS_CONDITIONAL_PRESETS,
    PUBLISHED_GUIDANCE,
    ClassConditionalConfig,
)
from models.class_conditional.guidance import GuidanceSchedule, guidance_at
from models.class_conditional.model import ClassConditionalModel
from models.class_conditional.sampling import sample

__all__ = [
    "CLASS_CONDITIONAL_PRESETS",
    "PUBLISHED_GUIDANCE",
    "ClassConditionalConfig",
    "ClassConditionalModel",
    "GuidanceSchedule",
    "guidance_at",
    "sample",
]
