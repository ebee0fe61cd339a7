"""Qwen3 from transformers, with our attention plans in the place of its masks.

B sequences, T tokens, D width. Source: Qwen3 is arXiv 2505.09388, of which the paper (arXiv 2602.14041)
changes nothing but the mask.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from models.backbone.attention import AttentionPlan
from models.backbone.cache import GenerationCache

ATTENTION = "bitdance_plan"


def _attend_by_plan(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionPlan, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; the plan travels where it expects a mask."""
    return attention_mask(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend_by_plan)


def build_backbone(config: Qwen3Config) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, whose attention takes plans.

    What `config` says of padding and dropout is for whoever reads an export: here every row of the embedding
    learns, and nothing is dropped.
    """
    config = copy.deepcopy(config)
    config.pad_token_id = None  # its row would get no gradient
    llm = Qwen3ForCausalLM(config)
    llm.set_attn_implementation(ATTENTION)
    return llm


def run_backbone(
    llm: Qwen3ForCausalLM,
    embeddings: Tensor,
    position_ids: Tensor,
    plan: AttentionPlan,
    cache: GenerationCache | None = None,
) -> Tensor:
    """Hidden states [B, T, D] after the final norm, in the dtype of the weights; no lm_head.

    embeddings [B, T, D] in the dtype of the weights, position_ids int64 [B, T] for the rotary positions.
    With a cache, `plan` is its `attend` or the prompts' plan, and T counts the new tokens alone.
    """
    output = llm.model(
        inputs_embeds=embeddings,
        position_ids=position_ids,
        attention_mask={"full_attention": plan},
        past_key_values=cache,
        use_cache=False,
    )
    return output.last_hidden_state
