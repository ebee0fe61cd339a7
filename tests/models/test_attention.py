"""The mask against its definition in plain Python, the attention backends against one another, the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import Qwen3Config

from models.backbone import Backend, GenerationCache, build_backbone, plan_packed, run_backbone
from models.backbone.attention import attend_all, flex_mask
from models.layout import attention_mask

BACKENDS_WITH_GRADIENTS: tuple[Backend, ...] = ("dense", "documents")

# A document is runs of tokens: ("causal", length) or ("blocks", how many, tokens in each).
causal_runs = st.tuples(st.just("causal"), st.integers(1, 7))
block_runs = st.tuples(st.just("blocks"), st.integers(1, 3), st.sampled_from([1, 4, 9]))
layouts = st.lists(st.lists(causal_runs | block_runs, min_size=1, max_size=3), min_size=1, max_size=3)


def places(layout: list[list[tuple[Any, ...]]]) -> list[tuple[int, int | None]]:
    """(document, block or None) of every token, by counting."""
    found: list[tuple[int, int | None]] = []
    blocks = 0
    for document, runs in enumerate(layout):
        for run in runs:
            if run[0] == "causal":
                found += [(document, None)] * run[1]
                continue
            for _ in range(run[1]):
                found += [(document, blocks)] * run[2]
                blocks += 1
    return found


def ids(layout: list[list[tuple[Any, ...]]]) -> tuple[torch.Tensor, torch.Tensor]:
    found = places(layout)
    document_ids = torch.tensor([document for document, _ in found])
    return document_ids, torch.tensor([-1 if block is None else block for _, block in found])


@settings(max_examples=1000, deadline=None)
@given(layouts)
def test_mask_is_its_definition(layout: list[list[tuple[Any, ...]]]) -> None:
    tokens = places(layout)
    mask = attention_mask(*ids(layout)).tolist()
    for query, (document, block) in enumerate(tokens):
        for key, (other_document, other_block) in enumerate(tokens):
            together = block is not None and block == other_block
            assert mask[query][key] == (document == other_document and (key <= query or together))


def plain_attention(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax over the whole mask, each query head with a copy of its keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@settings(max_examples=60, deadline=None)
@given(layouts, st.sampled_from([(2, 2), (4, 2), (6, 1)]), st.integers(0, 2**31))
def test_backends_agree(layout: list[list[tuple[Any, ...]]], heads: tuple[int, int], seed: int) -> None:
    """Outputs and gradients in float32, to 1e-5."""
    document_ids, block_ids = ids(layout)
    generator = torch.Generator().manual_seed(seed)
    length = len(document_ids)
    q, k, v = (torch.randn(1, n, length, 16, generator=generator) for n in (heads[0], heads[1], heads[1]))
    weights = torch.randn(1, heads[0], length, 16, generator=generator)

    def run(attend: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]

    expected = run(partial(plain_attention, attention_mask(document_ids, block_ids)))
    for backend in BACKENDS_WITH_GRADIENTS:
        found = run(plan_packed(document_ids, block_ids, backend))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_flex_mask_agrees(layout: list[list[tuple[Any, ...]]]) -> None:
    document_ids, block_ids = ids(layout)
    mask = flex_mask(document_ids, block_ids)
    length = len(document_ids)
    spelled_out = create_mask(mask.mask_mod, None, None, length, length, device="cpu")[0, 0]
    assert torch.equal(spelled_out, attention_mask(document_ids, block_ids))


# Documents long enough for the kernel's mask of 128 x 128 blocks to have several, some of them empty.
long_causal = st.tuples(st.just("causal"), st.integers(1, 90))
long_blocks = st.tuples(st.just("blocks"), st.integers(1, 12), st.sampled_from([1, 4, 16]))
long_layouts = st.lists(
    st.lists(long_causal | long_blocks, min_size=1, max_size=4), min_size=1, max_size=4
).filter(lambda layout: len(places(layout)) > 128)


@settings(max_examples=30, deadline=None)
@given(layouts | long_layouts, st.sampled_from([(2, 2), (4, 2), (6, 1)]), st.integers(0, 2**31))
def test_flex_attention_agrees(
    layout: list[list[tuple[Any, ...]]], heads: tuple[int, int], seed: int
) -> None:
    """The kernel itself on random layouts, to 1e-5; on a CPU it is slow and has no gradient."""
    document_ids, block_ids = ids(layout)
    generator = torch.Generator().manual_seed(seed)
    length = len(document_ids)
    q, k, v = (torch.randn(1, n, length, 16, generator=generator) for n in (heads[0], heads[1], heads[1]))
    expected = plain_attention(attention_mask(document_ids, block_ids), q, k, v)
    for backend in get_args(Backend):
        found = plan_packed(document_ids, block_ids, backend)(q, k, v)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'warp': expected one of flex, documents, dense"):
        plan_packed(torch.zeros(3).long(), torch.zeros(3).long(), "warp")  # type: ignore[arg-type]


def test_attention_to_all_shares_key_heads() -> None:
    q, k, v = torch.randn(3, 6, 4, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(attend_all(q, k, v), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prompts", [[9], [9, 5], [5, 9], [6, 6]])
def test_decoding_with_the_cache_is_one_long_forward(prompts: list[int]) -> None:
    """Prompts packed, then two steps of 4 tokens, 3 rows a prompt, against each row run at once in full."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    llm, rows, steps, P = build_backbone(config).eval(), 3, 2, 4
    prompt_inputs = [torch.randn(length, 32) for length in prompts]
    step_inputs = torch.randn(steps, len(prompts) * rows, P, 32)
    with torch.no_grad():
        cache = GenerationCache(prompts, rows, steps * P, config, torch.float32, torch.device("cpu"))
        document_ids = torch.arange(len(prompts)).repeat_interleave(torch.tensor(prompts))
        position_ids = torch.cat([torch.arange(length) for length in prompts])
        plan = plan_packed(document_ids, torch.full_like(document_ids, -1))
        packed = torch.cat(prompt_inputs)[None]
        first = run_backbone(llm, packed, position_ids[None], plan, cache)[0].split(prompts)
        cache.decode_from_here()
        buffers = cache.keys.data_ptr(), cache.values.data_ptr()
        decoded = [run_backbone(llm, x, cache.advance(P), cache.attend, cache) for x in step_inputs]
        assert (cache.keys.data_ptr(), cache.values.data_ptr()) == buffers
        for row in range(len(prompts) * rows):
            half = row // rows
            length = prompts[half]
            full = torch.cat([prompt_inputs[half], *step_inputs[:, row]])
            blocks = torch.cat([torch.full((length,), -1), torch.arange(steps * P) // P])
            whole = plan_packed(torch.zeros_like(blocks), blocks, "dense")
            expected = run_backbone(llm, full[None], torch.arange(len(full))[None], whole)[0]
            torch.testing.assert_close(first[half], expected[:length], atol=1e-5, rtol=1e-4)
            for step in range(steps):
                start = length + step * P
                torch.testing.assert_close(
                    decoded[step][row], expected[start : start + P], atol=1e-5, rtol=1e-4
                )
