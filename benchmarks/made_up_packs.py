"""Packs of made-up pictures and captions with the lengths that training has, for timing a model."""

import numpy as np
import torch

from data_pipeline.batch_recipe import BatchRecipe
from data_pipeline.global_batch import BatchPlan
from models.layout import PackedBatch, Sample, SequenceTokens, pack
from models.text_to_image import TextToImageConfig
from trainer.costs import sample_cost
from trainer.plan.batches import AssumedDataset


def made_up_tokens(p: int) -> SequenceTokens:
    """Ids of special tokens below 512: which they are makes no difference to time."""
    queries = tuple(range(300, 300 + p * p - 1))
    return SequenceTokens(
        1, 2, 3, 4, {k: 10 + k for k in range(1, 257)}, queries, (1, 5, 6), (2, 6), (1, 7, 6)
    )


def made_up_packs(
    config: TextToImageConfig, recipe: BatchRecipe, step: int
) -> tuple[list[PackedBatch], float]:
    """The packs of one step on one rank, and its FLOPs: forward and backward, without recomputation."""
    p, bits = config.p, config.head.ch_target
    tokens, cost = made_up_tokens(p), sample_cost(config)
    dataset = AssumedDataset([r for r, weight in recipe.ratio.items() if weight], config.tokenizer_downsample)
    plan = BatchPlan(recipe, dataset, p, tokens.template, 1, cost)
    batch = plan.step(step)
    rng = np.random.default_rng(step)

    def sample(number: int) -> Sample:
        ref = batch[number]
        size, patches = ref.h * ref.w, ref.h * ref.w // p**2
        made = Sample(
            torch.from_numpy(rng.integers(0, 2, (size, bits), np.int8) * 2 - 1),
            ref.h,
            ref.w,
            rng.integers(0, config.llm.vocab_size, ref.n_text).tolist(),
            ref.task,
            ref.drop_text,
        )
        if ref.task == "t2i":
            made.flip = torch.from_numpy(rng.random((size, bits), np.float32) < 0.05)
            made.t = torch.from_numpy(rng.uniform(0.01, 0.99, patches).astype(np.float32))
            made.noise = torch.from_numpy(rng.standard_normal((patches, p * p, bits), np.float32))
        return made

    (packs,) = plan.assign(batch).packs
    forward = cost.of(batch.length, batch.vision_targets, batch.text_targets).sum() * cost.per_token / 1000
    return [pack([sample(int(n)) for n in numbers], tokens, p) for numbers in packs], 3 * float(forward)
