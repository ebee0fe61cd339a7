"""The binary tokenizer and its quantizer once more: numpy in float64, plain loops, from the definitions.

Shares no code with the network. x is [channels, rows, columns]; `p` is a state dict as numpy arrays.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = dict[str, Array]


def conv(x: Array, weight: Array, bias: Array | None, stride: int = 1) -> Array:
    out_channels, _, side, _ = weight.shape
    pad = side // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    rows, columns = (x.shape[1] - 1) // stride + 1, (x.shape[2] - 1) // stride + 1
    out = np.zeros((out_channels, rows, columns))
    for r, c in itertools.product(range(rows), range(columns)):
        window = padded[:, r * stride : r * stride + side, c * stride : c * stride + side]
        for o in range(out_channels):
            out[o, r, c] = (weight[o] * window).sum() + (0.0 if bias is None else bias[o])
    return out


def group_norm(x: Array) -> Array:
    out = np.empty_like(x)
    size = len(x) // 32
    for g in range(32):
        values = x[g * size : (g + 1) * size]
        variance = ((values - values.mean()) ** 2).mean()
        out[g * size : (g + 1) * size] = (values - values.mean()) / math.sqrt(variance + 1e-6)
    return out


def norm_swish(p: Params, name: str, x: Array) -> Array:
    y = group_norm(x) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
    return y / (1.0 + np.exp(-y))


def residual_block(p: Params, name: str, x: Array) -> Array:
    y = conv(norm_swish(p, f"{name}.norm1", x), p[f"{name}.conv1.weight"], None)
    y = conv(norm_swish(p, f"{name}.norm2", y), p[f"{name}.conv2.weight"], None)
    shortcut = p.get(f"{name}.nin_shortcut.weight")
    return y + (x if shortcut is None else conv(x, shortcut, None))


def encode_raw(p: Params, x: Array, levels: int, blocks: int) -> Array:
    x = conv(x, p["encoder.conv_in.weight"], None)
    for i in range(levels):
        for j in range(blocks):
            x = residual_block(p, f"encoder.down.{i}.block.{j}", x)
        if i < levels - 1:
            name = f"encoder.down.{i}.downsample"
            x = conv(x, p[f"{name}.weight"], p[f"{name}.bias"], stride=2)
    for j in range(blocks):
        x = residual_block(p, f"encoder.mid_block.{j}", x)
    return conv(
        norm_swish(p, "encoder.norm_out", x), p["encoder.conv_out.weight"], p["encoder.conv_out.bias"]
    )


def decode(p: Params, bits: Array, levels: int, blocks: int, noise: Array | None = None) -> Array:
    mean, deviation = np.zeros(len(bits)), np.zeros(len(bits))
    for k, plane in enumerate(bits):
        values = plane.ravel().tolist()
        mean[k] = sum(values) / len(values)
        unbiased = sum((v - mean[k]) ** 2 for v in values) / (len(values) - 1)
        deviation[k] = math.sqrt(unbiased + 1e-6)
    x = bits if noise is None else np.concatenate([bits, noise])
    x = conv(x, p["decoder.conv_in.weight"], p["decoder.conv_in.bias"])
    for j in range(blocks):
        x = residual_block(p, f"decoder.mid_block.{j}", x)
    for i in reversed(range(levels)):
        name = f"decoder.adaptive.{i}"
        scale = p[f"{name}.gamma.weight"] @ deviation + p[f"{name}.gamma.bias"]
        shift = p[f"{name}.beta.weight"] @ mean + p[f"{name}.beta.bias"]
        x = group_norm(x) * scale[:, None, None] + shift[:, None, None]
        for j in range(blocks):
            x = residual_block(p, f"decoder.up.{i}.block.{j}", x)
        if i > 0:
            name = f"decoder.up.{i}.upsample.conv1"
            x = depth_to_space(conv(x, p[f"{name}.weight"], p[f"{name}.bias"]))
    return conv(
        norm_swish(p, "decoder.norm_out", x), p["decoder.conv_out.weight"], p["decoder.conv_out.bias"]
    )


def depth_to_space(x: Array) -> Array:
    channels, rows, columns = x.shape[0] // 4, x.shape[1], x.shape[2]
    out = np.zeros((channels, 2 * rows, 2 * columns))
    for c, r, k, dr, dk in itertools.product(range(channels), range(rows), range(columns), (0, 1), (0, 1)):
        out[c, 2 * r + dr, 2 * k + dk] = x[(dr * 2 + dk) * channels + c, r, k]
    return out


def group_lfq(x: Array, groups: int, temperature: float, eps: float) -> dict[str, float]:
    """x [batch, channels, rows, columns] -> the losses, one token and one code after the other."""
    d = x.shape[1] // groups
    codes = [[1.0 if index >> j & 1 else -1.0 for j in range(d)] for index in range(2**d)]
    usage, entropies, distances = [0.0] * len(codes), [], []
    for b, r, c, g in itertools.product(*map(range, (x.shape[0], x.shape[2], x.shape[3], groups))):
        token = [float(x[b, g * d + j, r, c]) for j in range(d)]
        logits = [2.0 * sum(t * s for t, s in zip(token, code, strict=True)) / temperature for code in codes]
        shift = max(logits) + math.log(sum(math.exp(v - max(logits)) for v in logits))
        logs = [v - shift for v in logits]  # eps, added to all logits alike, cancels
        entropies.append(-sum(math.exp(v) * v for v in logs))
        usage = [u + math.exp(v) for u, v in zip(usage, logs, strict=True)]
        distances += [(t - (1.0 if t > 0 else -1.0)) ** 2 for t in token]
    usage = [u / len(entropies) for u in usage]
    per_sample = sum(entropies) / len(entropies)
    codebook = -sum(u * math.log(u + eps) for u in usage)
    return {
        "per_sample_entropy": per_sample,
        "codebook_entropy": codebook,
        "entropy_loss": per_sample - codebook,
        "commitment": sum(distances) / len(distances),
    }
