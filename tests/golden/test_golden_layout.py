"""2D positions, block-causal masks and bit flips of the published models."""

import re

import pytest
import torch
from golden_files import Golden, golden_files

from models.layout import attention_mask, draw_flips, flip_bits, positions_2d


@pytest.mark.parametrize("golden", golden_files("positions_2d"))
def test_positions(golden: Golden) -> None:
    grids = [name for name in golden.names if name.startswith("out.pos_")]
    assert grids
    for name in grids:
        found = re.fullmatch(r"out\.pos_(\d+)x(\d+)_ps(\d+)", name)
        assert found, name
        h, w, p = map(int, found.groups())
        ours = positions_2d(h, w, golden.config["hidden_size"], p)
        torch.testing.assert_close(ours, golden.tensor(name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("golden", golden_files("mask_packed_"))
def test_packed_masks(golden: Golden) -> None:
    config = golden.config
    document_ids = torch.arange(len(config["document_lens"])).repeat_interleave(
        torch.tensor(config["document_lens"])
    )
    block_ids, first = [], 0
    for length, mode in zip(config["split_lens"], config["attn_modes"], strict=True):
        causal = length if mode == "causal" else 2  # <|vision_start|> and <|res_h|>
        blocks = torch.arange(length - causal) // config["parallel_num"] + first
        block_ids += [torch.full((causal,), -1), blocks]
        first += len(blocks.unique())
    assert torch.equal(attention_mask(document_ids, torch.cat(block_ids)), golden.tensor("out.mask"))


@pytest.mark.parametrize("golden", golden_files("projector"))
def test_flips(golden: Golden) -> None:
    bits = golden.tensor("in.bits")
    torch.manual_seed(golden.config["flip_seed"])
    flipped = flip_bits(bits, draw_flips(bits.shape, golden.config["flip_p_max"]))
    assert torch.equal(flipped, golden.tensor("out.flipped"))
