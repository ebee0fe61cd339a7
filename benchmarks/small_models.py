"""Text-to-image models in the proportions of the large ones, at sizes that a CPU trains."""

from models.text_to_image import TextToImageConfig, preset


def small_text_to_image(
    vocabulary: int, width: int, layers: int, heads: int, head_blocks: int
) -> TextToImageConfig:
    """A backbone with embeddings of its own at both ends and a head as wide as it; p = 4, 32 bits a token.

    Args:
        vocabulary: rows of each embedding.
        width: D of backbone and head.
        layers: of the backbone.
        heads: of its attention, half as many for keys and values.
        head_blocks: of the head; two share an adaptive-norm projection, where there are so many.
    """
    config = preset("0.6b", 4, vocabulary=vocabulary)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": width // heads}
    rest = {"tie_word_embeddings": False, "layer_types": None}
    llm = type(config.llm).from_dict({**config.llm.to_dict(), **sizes, **rest})
    head = {"ch_cond": width, "ch_latent": width}
    head |= {"depth_latent": head_blocks, "depth_adanln": max(1, head_blocks // 2)}
    return TextToImageConfig(llm, type(config.head).from_json({**config.head.to_json(), **head}))
