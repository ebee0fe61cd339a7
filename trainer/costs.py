"""What a model costs to train, in FLOPs, counted from its configuration."""

from __future__ import annotations

from math import prod

from data_pipeline.packing import SampleCost
from models.text_to_image import TextToImageConfig
from models.weights import expected_specs
from models.weights.layout import EMBEDDING, HEAD, OUTPUT, PROJECTOR
from trainer.adapters import adapter_sizes
from trainer.model_recipe import LoraSection

_PARTS = (("embedding", EMBEDDING), ("output", OUTPUT), ("projector", PROJECTOR), ("head", HEAD))
BACKWARD_AND_FORWARD = 3  # a backward pass costs two forward passes


def parameter_counts(config: TextToImageConfig, lora: LoraSection | None = None) -> dict[str, int]:
    """Parameters of the "embedding", the "output" embedding (0 where tied), the rest of the "backbone", the
    "adapters", the "projector" and the "head"."""
    counts = dict.fromkeys(("embedding", "output", "backbone", "adapters", "projector", "head"), 0)
    for name, spec in expected_specs(config).items():
        part = next((part for part, prefix in _PARTS if name.startswith(prefix)), "backbone")
        counts[part] += prod(spec.shape)
        counts["adapters"] += sum(adapter_sizes(name, spec.shape, lora))
    return counts


def sample_cost(config: TextToImageConfig, lora: LoraSection | None = None) -> SampleCost:
    """A third of the FLOPs of forward and backward pass, which is the forward pass where all is trained.

    Two for each weight that a token meets, and those of attention. A backward pass costs as much again for
    the gradient of what came in, and as much again for that of the weights, which frozen ones do without. The
    head's adaptive norms see a patch's time and condition for each of its tokens, so they count per token
    too.
    """
    counts, llm = parameter_counts(config, lora), config.llm
    backbone = 1.0 if lora is None else 2 / BACKWARD_AND_FORWARD
    return SampleCost(
        per_token=2.0 * (backbone * counts["backbone"] + counts["adapters"]),
        per_vision_target=2.0 * counts["head"],
        per_text_target=2.0 * backbone * llm.vocab_size * llm.hidden_size,
        per_pair=4.0 * llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim,
    )
