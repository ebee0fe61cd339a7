"""From p = 4 to p = 8: the same model, with the query tokens that larger patches need.

D width of the backbone. Source: the paper (arXiv 2602.14041) goes from 16 to 64 tokens a step; how the new
embeddings start is our own choice, told at `grow_patch`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.checks import WrongRequest
from models.layout import MAX_SIDE, add_sequence_tokens, sequence_tokens
from models.weights.layout import EMBEDDING, OUTPUT
from models.weights.source import ModelSource

NOISE = 0.1  # of the spread that the existing query embeddings have about their mean


def grow_patch(source: ModelSource, p: int, seed: int = 0) -> ModelSource:
    """The model of ``source`` with patches of p x p tokens, for the next stage of training to start from.

    A block of P = p*p tokens begins with `<|res_w|>` and P-1 query tokens, so p = 4 -> 8 adds `<|query_16|>`
    ... `<|query_63|>` to the text tokenizer and a row for each to the embedding (and to `lm_head`, where that
    is a matrix of its own). A new row is the mean of the existing query rows plus small noise: normal, with
    0.1 of the existing rows' standard deviation about their mean. The mean puts a new query where the model
    expects one; the noise lets the new queries part from one another in training. The other rows and all
    other weights stay as they are, bit for bit; the order of the visual tokens changes with p by itself,
    since it is computed, not stored.

    Args:
        source: a model of smaller patches; not changed.
        p: side of the new patches, in tokens.
        seed: of the noise; the same seed gives the same weights.

    Raises:
        WrongRequest: p is not larger than the model's own, or than any grid (`MAX_SIDE`), or the model has no
            query tokens to average (p = 1).
    """
    old_p = source.config.p
    if not old_p < p <= MAX_SIDE:
        raise WrongRequest(
            f"the model has patches of {old_p}x{old_p} tokens; expected a p larger than that, and at most "
            f"{MAX_SIDE}, not {p}"
        )
    if old_p == 1:
        raise WrongRequest("a model with p = 1 has no query tokens, whose mean the new ones would start from")
    text_tokenizer = copy.deepcopy(source.text_tokenizer)
    add_sequence_tokens(text_tokenizer, p)
    old = sequence_tokens(source.text_tokenizer, old_p).query
    new = sequence_tokens(text_tokenizer, p).query[len(old) :]
    # The embedding may already have more rows than there are tokens (Qwen pads it): those are used up first.
    rows = max(source.specs[EMBEDDING].shape[0], len(text_tokenizer))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in source.tensors():
            if name in (EMBEDDING, OUTPUT):
                yield name, grow_rows(tensor, old, new, rows, seed + (name == OUTPUT))
            else:
                yield name, tensor

    grown = _grown_sizes(source, p, rows)
    return dataclasses.replace(grown, tensors=tensors, text_tokenizer=text_tokenizer)


def _grown_sizes(source: ModelSource, p: int, rows: int) -> ModelSource:
    """``source`` with the configuration and the shapes of the grown model; its tensors are still the old."""
    specs = {
        name: spec._replace(shape=(rows, *spec.shape[1:])) if name in (EMBEDDING, OUTPUT) else spec
        for name, spec in source.specs.items()
    }
    llm = copy.deepcopy(source.config.llm)
    llm.vocab_size = rows
    head = dataclasses.replace(source.config.head, parallel_num=p * p)
    return dataclasses.replace(
        source, specs=specs, config=dataclasses.replace(source.config, llm=llm, head=head)
    )


def grow_rows(weight: Tensor, old: Sequence[int], new: Sequence[int], rows: int, seed: int) -> Tensor:
    """``weight`` [rows before, D] with ``rows`` rows, those of the ids ``new`` set as `grow_patch` says.

    ``old`` are the ids whose rows are averaged, in float32; the result [rows, D] has the float dtype of
    ``weight``. ``rows`` is at least the number before and above every id. Rows that no token uses are zero
    where they are added.
    """
    queries = weight[list(old)].float()
    mean = queries.mean(dim=0)
    spread = (queries - mean).square().mean().sqrt()
    noise = torch.randn(len(new), weight.shape[1], generator=torch.Generator().manual_seed(seed))
    grown = weight.new_zeros(rows, weight.shape[1])
    grown[: weight.shape[0]] = weight
    grown[list(new)] = (mean + NOISE * spread * noise).to(weight.dtype)
    return grown
