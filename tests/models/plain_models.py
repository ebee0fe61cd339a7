"""The diffusion head and the class-conditional transformer again: numpy, float64, one sequence, plain loops.

Written from the definitions, sharing nothing with `models`; slow on purpose.
"""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def swiglu(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    a, b = np.split(linear(w, f"{name}w1", x), 2, axis=-1)
    return linear(w, f"{name}w2", silu(a) * b)


def layer_norm(x: np.ndarray, w: Weights | None = None, name: str = "") -> np.ndarray:
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal if w is None else normal * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """One head, `[T, e]` each; row i sees column j where visible[i, j]."""
    scores = np.where(visible, q @ k.T / math.sqrt(q.shape[1]), -np.inf)
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True) @ v


def split_heads(qkv: np.ndarray, heads: int) -> list[list[np.ndarray]]:
    """`[T, 3D]` -> per head, its q, k, v."""
    thirds = np.split(qkv, 3, axis=-1)
    return [[np.split(third, heads, axis=-1)[h] for third in thirds] for h in range(heads)]


def head_predicts(w: Weights, x: np.ndarray, t: float, cond: np.ndarray, kind: str, heads: int) -> np.ndarray:
    """x `[P, C]`, cond `[P, D]` -> predicted bits. kind: "text_to_image" or "class_conditional"."""
    frequencies = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
    features = [math.cos(1000 * t * f) for f in frequencies] + [math.sin(1000 * t * f) for f in frequencies]
    time = silu(linear(w, "net.time_embed.mlp.0", np.array(features)))
    y = silu(linear(w, "net.time_embed.mlp.2", time) + linear(w, "net.cond_embed", cond))
    x = linear(w, "net.input_proj", x)
    depth = len({name.split(".")[2] for name in w if name.startswith("net.res_blocks.")})
    shared = len({name.split(".")[2] for name in w if name.startswith("net.ada_ln_blocks.")})
    for i in range(depth):
        block, ada = f"net.res_blocks.{i}.", linear(w, f"net.ada_ln_blocks.{i * shared // depth}", y)
        if f"{block}norm.weight" in w:  # the single-token net
            scale, shift, gate = np.split(ada, 3, axis=-1)
            x = x + gate * swiglu(w, block, layer_norm(x, w, f"{block}norm") * (1 + scale) + shift)
            continue
        scale1, shift1, gate1, scale2, shift2, gate2 = np.split(ada, 6, axis=-1)
        normal = layer_norm(x, w, f"{block}norm1") * (1 + scale1) + shift1
        visible = np.ones((len(x), len(x)), dtype=bool)
        parts = split_heads(linear(w, f"{block}attn.wqkv", normal), heads)
        attended = np.concatenate([attend(q, k, v, visible) for q, k, v in parts], axis=-1)
        x = x + gate1 * linear(w, f"{block}attn.wo", attended)
        normal = layer_norm(x, w, f"{block}norm2") * (1 + scale2) + shift2
        if f"{block}w1.weight" in w:
            x = x + gate2 * swiglu(w, block, normal)
        else:
            x = x + gate2 * linear(w, f"{block}mlp.2", silu(linear(w, f"{block}mlp.0", normal)))
    scale, shift = np.split(linear(w, "net.final_layer.ada_ln_modulation", y), 2, axis=-1)
    out = linear(w, "net.final_layer.linear", layer_norm(x) * (1 + scale) + shift)
    return 2 / (1 + np.exp(-out)) - 1 if kind == "text_to_image" else out


def rotate(x: np.ndarray, place: tuple[float, float] | None) -> np.ndarray:
    """One head of one token `[e]`, at (column, row) or, for None, not at all."""
    if place is None:
        return x
    pairs, out = len(x) // 2, x.copy()
    for k in range(pairs):
        axis, which = divmod(k, pairs // 2)
        angle = (place[axis] + 1.5) * 10000 ** (-2 * which / pairs)
        u, v = x[2 * k], x[2 * k + 1]
        out[2 * k] = u * math.cos(angle) - v * math.sin(angle)
        out[2 * k + 1] = u * math.sin(angle) + v * math.cos(angle)
    return out


def hidden_states(
    w: Weights,
    bits: np.ndarray,
    label: int,
    places: list[tuple[int, int]],
    heads: int,
    tokens: int,
    causal: bool,
) -> np.ndarray:
    """bits `[h*w, C]` in the model's order, places their (column, row) -> the head's condition `[h*w, D]`.

    tokens is P; causal switches off full attention inside a block.
    """
    width = w["norm.weight"].shape[0]
    prefix = [w["cls_embedding.weight"][label].reshape(-1, width)]
    classes = len(prefix[0])
    if tokens > 1:
        prefix.append(w["query_token"][0])
    fed = len(bits) - tokens
    x = np.concatenate([*prefix, swiglu(w, "proj_in.", bits[:fed])])
    x = rms_norm(w, "emb_norm", x)
    at = [None] * (classes + tokens - 1) + places[:fed]
    block = [-1] * (classes - 1) + [i // tokens for i in range(len(x) - classes + 1)]
    visible = np.array(
        [
            [j <= i or (not causal and block[i] >= 0 and block[i] == block[j]) for j in range(len(x))]
            for i in range(len(x))
        ]
    )
    depth = len({name.split(".")[1] for name in w if name.startswith("layers.")})
    for i in range(depth):
        layer, out = f"layers.{i}.", []
        for q, k, v in split_heads(
            linear(w, f"{layer}attention.wqkv", rms_norm(w, f"{layer}attention_norm", x)), heads
        ):
            q, k = (np.stack([rotate(row, p) for row, p in zip(z, at, strict=True)]) for z in (q, k))
            out.append(attend(q, k, v, visible))
        x = x + linear(w, f"{layer}attention.wo", np.concatenate(out, axis=-1))
        x = x + swiglu(w, f"{layer}feed_forward.", rms_norm(w, f"{layer}ffn_norm", x))
    return rms_norm(w, "norm", x)[-len(bits) :] + w["pos_for_diff.weight"]
