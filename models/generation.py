"""Sampling pictures: the prompts in one packed forward, then P tokens per step with a cache.

Per step: head -> bits -> projector + positions -> one backbone forward, in which the new tokens see the cache
and each other. Nothing is computed after the last patch, and no logits of text at all.

n pictures, R rows (n, or 2n with guidance, conditional rows first), P tokens per step, D width. Hidden states
have the weights' dtype, ids and positions are int64.

Source: next-patch diffusion of the paper (arXiv 2602.14041), `gen_image` in modeling/mllm.py of the published
code; classifier-free guidance is arXiv 2207.12598.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from models.backbone import GenerationCache, plan_packed, run_backbone
from models.checks import is_count
from models.flow_settings import FlowSettings
from models.head.flow import wrong_generator
from models.layout import SequenceTokens, check_grid, grid_places, plain_ids
from models.packed_linear import packed_linears
from models.tokenizer import binarize

if TYPE_CHECKING:
    from models.text_to_image import TextToImageConfig, TextToImageModel


USES_THAT_PAY = 10
"""Packing the weights of a linear layer takes as long as it saves in about so many of its uses."""


Progress = Callable[[Sequence[Any]], Iterable[Any]]


def check_request(
    config: "TextToImageConfig",
    tokens: SequenceTokens,
    prompts: Sequence[Sequence[int] | Tensor],
    grid: tuple[int, int],
    num_images: int,
    flow: FlowSettings,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The prompts as plain token ids; raises one ValueError with everything that is wrong with a request.

    A grid that the patches do not tile, an empty prompt, what is no prompt, ids outside the vocabulary, a
    prompt that leaves no room for the picture in the backbone's context, special tokens of other patches, no
    pictures asked for, a guidance below 1, fewer than one step, an unknown sampler.
    """
    problems, plain, picture = [], [], 0
    try:
        check_grid(*grid, config.p)
        picture = math.prod(grid) + 2
    except ValueError as error:
        problems.append(str(error))
    for prompt in prompts:
        try:
            plain.append(_prompt_that_fits(prompt, config.llm, picture))
        except ValueError as error:
            problems.append(str(error))
    queries = config.head.parallel_num - 1
    if not isinstance(tokens, SequenceTokens):
        problems.append(f"tokens is {reprlib.repr(tokens)}: expected what `sequence_tokens` returns")
    elif len(tokens.query) != queries:
        problems.append(
            f"tokens has {len(tokens.query)} query tokens: expected the {queries} of this model's p = "
            f"{config.p}"
        )
    if not is_count(num_images):
        problems.append(f"num_images is {reprlib.repr(num_images)}: expected a whole number of at least 1")
    problems += [*flow.problems(), *wrong_generator(generator)]
    if problems:
        raise ValueError("; ".join(problems))
    return plain


def _prompt_that_fits(prompt: Sequence[int] | Tensor, llm: Qwen3Config, picture: int) -> list[int]:
    """Its ids; ValueError unless they are of this vocabulary, and fit the context beside the picture."""
    ids, context = plain_ids(prompt), llm.max_position_embeddings
    foreign = [i for i in ids if not 0 <= i < llm.vocab_size]
    if not ids:
        raise ValueError("a prompt is empty: it needs at least one token")
    if foreign:
        raise ValueError(
            f"a prompt holds {reprlib.repr(foreign)}: expected token ids from 0 to {llm.vocab_size - 1}, "
            "made of a caption by the text tokenizer and `SequenceTokens.prompt`"
        )
    if len(ids) + picture > context:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and a picture of {picture} exceed the context of {context} "
            f"tokens: shorten the prompt to {max(context - picture, 0)} tokens, or choose a smaller picture"
        )
    return ids


@torch.inference_mode()
def generate_bits(
    model: "TextToImageModel",
    prompts: Sequence[Sequence[int]],
    grid: tuple[int, int],
    tokens: SequenceTokens,
    num_images: int,
    flow: FlowSettings,
    generator: torch.Generator | None = None,
    progress: Progress = iter,
) -> Tensor:
    """float32 bits [n, h*w, C] of -1/+1 in patch raster order, of a request that `check_request` let pass.

    prompts: ids before <|vision_start|>, the conditional prompt and, with guidance, the unconditional one.
    grid: (h, w) in tokens. The generator draws on the model's device; None takes torch's own.
    progress: goes through the patches, and may show how far it is.
    """
    P = model.config.head.parallel_num
    rows, cols = (axis.to(model.llm.device).split(P) for axis in grid_places(*grid, model.config.p))
    places = list(zip(rows, cols, strict=True))
    picture = tokens.picture_start(*grid)
    cache, hidden = _read_prompts(
        model, [[*prompt, *picture] for prompt in prompts], num_images, math.prod(grid)
    )
    solver = model.vision_head.solver_steps(flow.steps)
    patches: list[Tensor] = []
    with packed_linears(_worth_packing(model, flow.steps, len(places)), rows=hidden[..., 0].numel()):
        for step, place in enumerate(progress(places)):
            if step:
                # Both halves read the same bits; they differ in their prompts, and so in their positions.
                embeddings = model.embed_bits(patches[-1].to(hidden.dtype), *places[step - 1])
                embeddings = embeddings.repeat(len(prompts), 1, 1)
                hidden = run_backbone(model.llm, embeddings, cache.advance(P), cache.attend, cache)
            condition = model.head_condition(hidden, *place)
            drawn = model.vision_head.sample(
                condition, flow.guidance, steps=solver, sampler=flow.sampler, generator=generator
            )
            patches.append(binarize(drawn[:num_images]))
    return torch.cat(patches, dim=1)


def _worth_packing(model: "TextToImageModel", steps: int, patches: int) -> list[nn.Module]:
    """The parts whose weights serve often enough in one call to be laid out anew for it."""
    uses: list[tuple[nn.Module, int]] = [
        (model.llm.model.layers, patches - 1),
        (model.vision_head.net, patches * (steps + 1)),
    ]
    return [part for part, times in uses if times >= USES_THAT_PAY]


def _read_prompts(
    model: "TextToImageModel", prompts: list[list[int]], num_images: int, picture_tokens: int
) -> tuple[GenerationCache, Tensor]:
    """A cache that holds the prompts with their first blocks, and the hidden states [R, P, D] of these.

    The prompts are read once each, packed into one sequence, however many pictures are made of them.
    """
    P, llm = model.config.head.parallel_num, model.llm
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=llm.device)
    block_ids = torch.cat(
        [torch.full((n,), -1).index_fill(0, torch.arange(n - P, n), i) for i, n in enumerate(lengths)]
    ).to(ids.device)
    document_ids = torch.arange(len(prompts)).repeat_interleave(torch.tensor(lengths)).to(ids.device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
    cache = GenerationCache(lengths, num_images, picture_tokens - P, llm.config, llm.dtype, ids.device)
    embeddings = llm.get_input_embeddings()(ids)
    plan = plan_packed(document_ids, block_ids)
    hidden = run_backbone(llm, embeddings[None], position_ids[None], plan, cache)[0]
    cache.decode_from_here()
    first_blocks = torch.stack([part[-P:] for part in hidden.split(lengths)])
    return cache, first_blocks.repeat_interleave(num_images, dim=0)
