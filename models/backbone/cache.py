"""The key-value cache of one generation, allocated once.

A row is one picture in the making; with guidance the conditional rows come first, then as many unconditional
ones. The prompts of the two halves differ in length, so they are aligned at their right ends: from there on
every row writes at the same place, and a row's keys are one slice of the buffer, for which no mask is needed.
H heads, G key-value heads, E width of a head, S slots, P tokens per step. All keys, values and queries have
the dtype that the cache was made with.

Source: the decode step is the paper's (arXiv 2602.14041): P tokens see all slots before them and each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from models.backbone.attention import attend_all


class GenerationCache:
    """Keys and values [layers, rows, G, S, E] of one float dtype, in the place of transformers' own cache."""

    def __init__(
        self,
        prompts: Sequence[int],
        rows_per_prompt: int,
        new_tokens: int,
        config: Qwen3Config,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """prompts: length in tokens of each half's prompt; new_tokens: how many follow in each row."""
        self.prompts, self.rows_per_prompt = list(prompts), rows_per_prompt
        self.end = max(self.prompts)
        self.starts = [self.end - length for length in self.prompts]
        rows, heads = len(self.prompts) * rows_per_prompt, config.num_key_value_heads
        shape = (config.num_hidden_layers, rows, heads, self.end + new_tokens, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.first_places = torch.tensor(self.starts, device=device).repeat_interleave(rows_per_prompt)
        self.prefilling = True

    def decode_from_here(self) -> None:
        """The prompts are in: from now on `update` takes P tokens of all rows."""
        self.prefilling = False

    def advance(self, tokens: int) -> Tensor:
        """Begin a step of so many tokens; returns their positions in their rows, int64 [rows, tokens]."""
        slots = torch.arange(self.end, self.end + tokens, device=self.first_places.device)
        self.end += tokens
        return slots - self.first_places[:, None]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a layer; returns what `attend` or the prompts' plan is to read.

        While prefilling, key and value are [1, G, sum(prompts), E], the prompts packed into one sequence, and
        come back as they are. Later they are [rows, G, P, E], and what comes back is [rows, G, end, E]: views
        of all slots filled so far. layer_idx counts from 0; cache_kwargs is transformers' and not read.
        """
        if self.prefilling:
            self._store_prompts(self.keys[layer_idx], key)
            self._store_prompts(self.values[layer_idx], value)
            return key, value
        step = slice(self.end - key.shape[2], self.end)
        self.keys[layer_idx][:, :, step] = key
        self.values[layer_idx][:, :, step] = value
        return self.keys[layer_idx][:, :, : self.end], self.values[layer_idx][:, :, : self.end]

    def _store_prompts(self, buffer: Tensor, packed: Tensor) -> None:
        rows = self.rows_per_prompt
        for half, part in enumerate(packed.split(self.prompts, dim=2)):
            buffer[half * rows : (half + 1) * rows, :, self.starts[half] : max(self.prompts)] = part

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots filled, of the longest prompt and the steps so far, as transformers asks for it."""
        return self.end

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention plan of a decode step: queries see their own row's slots and each other.

        q [rows, H, P, E], k and v [rows, G, end, E] as `update` gives them -> [rows, H, P, E], q's dtype.
        """
        if not any(self.starts):
            return attend_all(q, k, v)
        halves = zip(*(x.split(self.rows_per_prompt) for x in (q, k, v)), self.starts, strict=True)
        return torch.cat([attend_all(hq, hk[:, :, s:], hv[:, :, s:]) for hq, hk, hv, s in halves])
