"""Drawing images from a class-conditional model, P tokens at a time, with a key-value cache.

Rows of the batch: B conditional ones first; with guidance B unconditional ones (null class) after them. Under
the linear schedule the scale of step 0 is 1: there each half draws its own first patch from its own noise and
goes on with it; from step 1 on both halves share the bits. A seed gives the published images only this way.

B images, C bits, P tokens per step, D width. Source: `sample` in imagenet_gen/src/model_parallel.py of the
code published with the paper (arXiv 2602.14041); guidance is arXiv 2207.12598.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone.attention import attend_all
from models.class_conditional.cache import KeyValueCache
from models.class_conditional.guidance import GuidanceSchedule, guidance_at, wrong_schedule
from models.class_conditional.model import ClassConditionalModel
from models.class_conditional.order import from_sequence_order, rotations, sequence_attention
from models.flow_settings import FlowSettings
from models.head import SamplerName
from models.head.flow import wrong_generator
from models.packed_linear import packed_linears
from models.tokenizer import binarize


@torch.inference_mode()
def sample(
    model: ClassConditionalModel,
    labels: Tensor | Sequence[int],
    guidance: float = 1.0,
    *,
    steps: int = 100,
    schedule: GuidanceSchedule = "linear",
    sampler: SamplerName = "euler_maruyama",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one image per label.

    Args:
        labels: class numbers `[B]`, a list or a tensor of any integer dtype: 0 to num_classes - 1, or
            num_classes for a picture of no class.
        guidance: classifier-free guidance, at least 1; 1 leaves the unconditional half out altogether.
        steps: solver steps of the head per autoregressive step (100 for the published FIDs).
        schedule: "linear" (published) or "constant" guidance over the autoregressive steps.
        sampler: solver of the head.
        generator: where the draws come from; the global one of the model's device if None.

    Returns bits of -1/+1, float32 `[B, C, h, w]`, plain raster order, for a tokenizer's `decode`.
    Raises ValueError on unknown labels, schedules or samplers, a guidance below 1, fewer than one step, or
    arguments of another type.
    """
    flow = FlowSettings(guidance, steps, sampler)
    problems = [*flow.problems(), *wrong_schedule(schedule), *wrong_generator(generator)]
    if problems:
        raise ValueError("; ".join(problems))
    labels = model.check_labels(labels)
    config, images = model.config, labels.shape[0]
    if guidance > 1.0:
        labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    solver = model.head.solver_steps(steps)
    patches: list[Tensor] = []
    with packed_linears([model.layers, model.head.net], rows=labels.shape[0] * config.parallel_num):
        cache, condition = prefill(model, labels)
        for step in range(config.steps):
            scale = guidance_at(step, config.steps, guidance, schedule) if guidance > 1.0 else 1.0
            drawn = model.head.sample(condition, scale, steps=solver, sampler=sampler, generator=generator)
            bits = binarize(drawn)  # [rows, P, C]
            patches.append(bits[:images])
            if step + 1 < config.steps:  # nothing needs the last patch
                condition = feed_patch(model, cache, bits, step)
    return from_sequence_order(torch.cat(patches, dim=1), config)


def prefill(model: ClassConditionalModel, labels: Tensor) -> tuple[KeyValueCache, Tensor]:
    """Run the class and query tokens; rows of one class (the null class above all) are run once.

    labels: int64 `[rows]`. Returns the cache of all rows, and the head's condition for the first patch,
    `[rows, P, D]` in the dtype of the weights.
    """
    config = model.config
    classes, class_of_row = torch.unique(labels, return_inverse=True)
    cache = KeyValueCache(config, labels.shape[0], model.dtype, model.device)
    by_class = KeyValueCache(config, classes.shape[0], model.dtype, model.device)
    x = _run(model, by_class, model.embed_prefix(classes))
    cache.take_rows(by_class, class_of_row)
    return cache, model.condition(x[:, -config.parallel_num :], 0)[class_of_row]


def feed_patch(model: ClassConditionalModel, cache: KeyValueCache, bits: Tensor, step: int) -> Tensor:
    """Append the patch of `step` (from 0); returns the head's condition for the next one.

    bits `[rows, P, C]` of -1/+1, any float dtype -> `[rows, P, D]` in the dtype of the weights.
    """
    x = _run(model, cache, model.embed_bits(bits))
    return model.condition(x, (step + 1) * model.config.parallel_num)


def _run(model: ClassConditionalModel, cache: KeyValueCache, x: Tensor) -> Tensor:
    """The layers on new positions `[rows, T, D]`, which see the cache and, by the mask, one another."""
    start, end = cache.length, cache.length + x.shape[1]
    if start == 0:
        attend = sequence_attention(model.config, end, x.device)
    elif model.config.mask == "causal":
        attend = _causal_attention
    else:
        attend = attend_all  # one block: it sees everything before it and all of itself
    attends = [cache.remembering(layer, attend) for layer in range(model.config.n_layer)]
    x = model.run_layers(x, rotations(model.config, x.device)[start:end], attends)
    cache.advance(end - start)
    return x


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last queries of a sequence, each to the keys up to its own."""
    new, seen = q.shape[2], k.shape[2]
    mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
