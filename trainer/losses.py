"""From unreduced losses to one number whose gradient does not depend on how a batch was cut, but for rounding
(`ZeroSection.stage` says where that is large).

Losses are sums divided by counts of the *global* batch, which every rank knows beforehand. The engine
averages gradients over ranks, so each rank's share is multiplied by their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.loader import StepCounts
from models.text_to_image import Losses
from trainer.recipe import LossSection


class StepLosses:
    """Adds up one rank's losses of a step, one micro-step after the other."""

    def __init__(self, section: LossSection, counts: StepCounts, ranks: int, device: torch.device):
        self._section, self._ranks = section, ranks
        self._vision_targets, self._text_targets = max(1, counts.vision_targets), max(1, counts.text_targets)
        self._by_resolution = counts.vision_targets_by_resolution
        # [classes + 1]: summed vision loss by class, summed text loss
        self.sums = torch.zeros(len(self._by_resolution) + 1, dtype=torch.float64, device=device)

    def add(self, losses: Losses, patch_resolution: Tensor) -> Tensor:
        """The scalar to run backward from for one micro-step.

        Args:
            losses: vision [N, P] and text [L], float32.
            patch_resolution: int64 [N], class of each patch.
        """
        vision, text = losses.vision.sum(), losses.text.sum()
        per_patch = losses.vision.detach().double().sum(dim=1)
        for place, resolution in enumerate(self._by_resolution):
            self.sums[place] += (per_patch * (patch_resolution == resolution)).sum()
        self.sums[-1] += losses.text.detach().double().sum()
        share = (
            self._section.vision * vision / self._vision_targets
            + self._section.text * text / self._text_targets
        )
        return share * self._ranks

    def means(self, sums: Tensor) -> dict[str, float]:
        """Named means from `sums` [classes + 1] added up over all ranks; a class without targets is left out.

        "loss" is what is trained on; "vision_loss" the mean squared velocity error over tokens; "text_loss"
        is in nats.
        """
        *by_class, text = sums.tolist()
        means = {"loss": 0.0, "vision_loss": sum(by_class) / self._vision_targets}
        for (resolution, count), value in zip(self._by_resolution.items(), by_class, strict=True):
            if count:
                means[f"vision_loss_{resolution}"] = value / count
        means["text_loss"] = text / self._text_targets
        means["loss"] = self._section.vision * means["vision_loss"] + self._section.text * means["text_loss"]
        return means
