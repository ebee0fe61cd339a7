"""The published text-to-image folder: its files, and which config value decides which tensor's shape.

    config.json, tokenizer*                              as transformers writes them for Qwen3
    model-*.safetensors, model.safetensors.index.json    the language model (small: one `model.safetensors`)
    vision_head_config.json, vision_head.safetensors     the binary diffusion head, keys `net.*`
    projector.safetensors                                bits to embeddings, keys `fc1.*`, `fc2.*`
    ae_config.json, ae.safetensors                       the binary tokenizer, keys `encoder.*`, `decoder.*`

In memory all tensors but the tokenizer's have one key space, that of `TextToImageModel`'s state dict:
`llm.*`, `projector.*`, `vision_head.*`. Source: the weights published with the paper (arXiv 2602.14041).
"""

from __future__ import annotations

from collections.abc import Mapping

from models.tensor_files.safetensors_files import Place, plan_shards
from models.tensor_files.strict import Rule, TensorSpec

LLM_CONFIG, LLM_INDEX, LLM_WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "vision_head_config.json", "vision_head.safetensors"
PROJECTOR_WEIGHTS = "projector.safetensors"

LLM, PROJECTOR, HEAD = "llm.", "projector.", "vision_head."
EMBEDDING, OUTPUT = "llm.model.embed_tokens.weight", "llm.lm_head.weight"

SHARD_BYTES = 5_000_000_000  # per file of the language model; what transformers 4 writes by default


def plan_files(
    specs: Mapping[str, TensorSpec], shard_bytes: int = SHARD_BYTES
) -> tuple[dict[str, Place], dict | None]:
    """Which file each tensor of a model goes to, and the language model's index (None where it is one file).

    Args:
        specs: shape [...] and dtype of each tensor, by its name in memory.
        shard_bytes: largest size of a file of the language model, unless one tensor alone is larger.

    Raises:
        ValueError: a name that belongs to none of the three parts.
    """
    foreign = [name for name in specs if not name.startswith((LLM, PROJECTOR, HEAD))]
    if foreign:
        raise ValueError(f"not parts of a text-to-image model: {', '.join(foreign[:20])}")
    llm = {name.removeprefix(LLM): spec for name, spec in specs.items() if name.startswith(LLM)}
    shards, index = plan_shards(llm, shard_bytes)
    places = {LLM + name: place for name, place in shards.items()}
    for prefix, file in ((PROJECTOR, PROJECTOR_WEIGHTS), (HEAD, HEAD_WEIGHTS)):
        places |= {name: Place(file, name.removeprefix(prefix)) for name in specs if name.startswith(prefix)}
    return places, index


_LAYER = r"llm\.model\.layers\.\d+\."
_BLOCK = r"vision_head\.net\.res_blocks\.\d+\."
_QWEN = LLM_CONFIG

RULES = (
    Rule(r"llm\.model\.embed_tokens\.weight", _QWEN, ("vocab_size", "hidden_size")),
    Rule(r"llm\.lm_head\.weight", _QWEN, ("tie_word_embeddings", "vocab_size", "hidden_size")),
    Rule(
        _LAYER + r".*q_proj\..*",
        _QWEN,
        ("num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size"),
    ),
    Rule(
        _LAYER + r".*o_proj\..*",
        _QWEN,
        ("num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size"),
    ),
    Rule(
        _LAYER + r".*[kv]_proj\..*",
        _QWEN,
        ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size"),
    ),
    Rule(_LAYER + r".*[qk]_norm\..*", _QWEN, ("num_hidden_layers", "head_dim")),
    Rule(_LAYER + r"mlp\..*", _QWEN, ("num_hidden_layers", "intermediate_size", "hidden_size")),
    Rule(r"llm\..*", _QWEN, ("num_hidden_layers", "hidden_size")),
    Rule(r"projector\..*", HEAD_CONFIG, ("ch_target", "ch_cond")),
    Rule(r"vision_head\.net\.input_proj\..*", HEAD_CONFIG, ("ch_latent", "ch_target")),
    Rule(r"vision_head\.net\.cond_embed\..*", HEAD_CONFIG, ("ch_latent", "ch_cond")),
    Rule(r"vision_head\.net\.ada_ln_blocks\..*", HEAD_CONFIG, ("depth_adanln", "ch_latent")),
    Rule(_BLOCK + r"(w1|w2|mlp)\..*", HEAD_CONFIG, ("depth_latent", "use_swiglu", "ch_latent")),
    Rule(_BLOCK + r".*", HEAD_CONFIG, ("depth_latent", "ch_latent")),
    Rule(r"vision_head\.net\.final_layer\.linear\..*", HEAD_CONFIG, ("ch_target", "ch_latent")),
    Rule(r"vision_head\..*", HEAD_CONFIG, ("ch_latent",)),
)
