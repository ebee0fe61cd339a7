"""Order of tokens and places in a pack, against slow definitions that follow the words."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layout import (
    PUBLISHED_SIZES,
    PackedBatch,
    Sample,
    SequenceTokens,
    add_sequence_tokens,
    check_grid,
    document_length,
    document_targets,
    draw_flips,
    from_patch_raster,
    grid_places,
    pack,
    position_embedding,
    positions_2d,
    sequence_tokens,
    tiles_published_size,
    to_patch_raster,
)
from models.text_tokens import train_text_tokenizer

BITS = 3


def tokens_of(p: int) -> SequenceTokens:
    """Template parts of unusual lengths, and ids that tell their kind: 1000+k is a side, 2000+i a query."""
    return SequenceTokens(
        im_start=1,
        im_end=2,
        vision_start=3,
        vision_end=4,
        res={k: 1000 + k for k in range(1, 257)},
        query=tuple(2000 + i for i in range(1, p * p)),
        user_prefix=(1, 11, 12, 13),
        turn_end=(2, 14),
        assistant=(1, 15),
    )


def sample_of(h: int, w: int, p: int, n_text: int = 3, seed: int = 0, **changes: object) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    patches = h * w // (p * p)
    fields: dict[str, object] = {
        "bits": torch.randint(0, 2, (h * w, BITS), generator=generator, dtype=torch.int8) * 2 - 1,
        "h": h,
        "w": w,
        "caption_ids": list(range(100, 100 + n_text)),
        "flip": torch.rand(h * w, BITS, generator=generator) < 0.2,
        "t": torch.rand(patches, generator=generator),
        "noise": torch.randn(patches, p * p, BITS, generator=generator),
        "key": f"sample-{seed}",
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]


samples = st.builds(
    lambda p, rows, cols, n, i2t, drop, seed: (
        p,
        sample_of(rows * p, cols * p, p, n, seed, task="i2t" if i2t else "t2i", drop_text=drop and not i2t),
    ),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)


def plain_patch_raster(h: int, w: int, p: int) -> list[tuple[int, int]]:
    """(row, column) in patch raster order, by four loops."""
    return [
        (patch_row + row, patch_col + col)
        for patch_row in range(0, h, p)
        for patch_col in range(0, w, p)
        for row in range(p)
        for col in range(p)
    ]


@given(st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 4))
def test_patch_raster(p: int, patch_rows: int, patch_cols: int) -> None:
    h, w = patch_rows * p, patch_cols * p
    order = plain_patch_raster(h, w, p)
    x = torch.randn(h * w, 2)
    reordered = to_patch_raster(x, h, w, p)
    assert torch.equal(reordered, torch.stack([x[row * w + col] for row, col in order]))
    assert torch.equal(from_patch_raster(reordered, h, w, p), x)
    assert torch.equal(to_patch_raster(x[None], h, w, p, dim=1)[0], reordered)
    rows, cols = grid_places(h, w, p)
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == order


def test_positions_by_their_formula() -> None:
    h, w, width, p = 4, 8, 24, 2
    table = positions_2d(h, w, width, p)
    for place, (row, col) in enumerate(plain_patch_raster(h, w, p)):
        expected = []
        for k in (col, row):
            angles = [k * 10000 ** (-i / (width // 4)) for i in range(width // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[place], torch.tensor(expected), atol=1e-6, rtol=0)


def test_positions_round_as_the_published_table() -> None:
    """Its angles are float32 products: 188 x 0.1 stands 1e-6 from 18.8."""
    columns = position_embedding(torch.zeros(256).long(), torch.arange(256), 16)[:, :8]
    omega = torch.tensor([1.0, 0.1, 0.01, 0.001])
    angles = (torch.arange(256.0)[:, None] * omega).double()
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(columns.double(), expected, atol=2e-7, rtol=0)


def test_published_sizes_fit_both_patch_sizes() -> None:
    assert [len(PUBLISHED_SIZES[resolution]) for resolution in (1024, 512)] == [11, 7]
    for resolution, sizes in PUBLISHED_SIZES.items():
        for height, width in sizes:
            assert (width, height) in sizes and height % 128 == width % 128 == 0
            assert 0.8 < height * width / resolution**2 <= 1.0
            check_grid(height // 16, width // 16, 8)


def spelled_out(sample: Sample, tokens: SequenceTokens, p: int) -> list[int]:
    """The ids of a document, written down part by part; 0 stands for a vision token."""
    P, patches = p * p, sample.h * sample.w // (p * p)
    picture = [3, 1000 + sample.h, 1000 + sample.w, *tokens.query]
    if sample.task == "i2t":
        return [1, 11, 12, 13, *picture, *[0] * (patches * P), 4, 2, 14, 1, 15, *sample.caption_ids]
    user = [] if sample.drop_text else [1, 11, 12, 13, *sample.caption_ids, 2, 14]
    return [*user, 1, 15, *picture, *[0] * ((patches - 1) * P)]


def check_document(batch: PackedBatch, start: int, sample: Sample, index: int, p: int) -> int:
    """Everything that the pack says of one of its documents; returns where the document ends."""
    tokens, P = tokens_of(p), p * p
    ids = spelled_out(sample, tokens, p)
    inside = slice(start, start + len(ids))
    assert len(ids) == document_length(
        len(sample.caption_ids), sample.h, sample.w, p, sample.task, sample.drop_text, tokens.template
    )
    assert batch.position_ids[inside].tolist() == list(range(len(ids)))
    assert set(batch.document_ids[inside].tolist()) == {index}
    vision = [start + place for place, token in enumerate(ids) if token == 0]
    vision_here = (batch.vision_at >= inside.start) & (batch.vision_at < inside.stop)
    assert batch.vision_at[vision_here].tolist() == vision
    assert [token for token in batch.input_ids[inside].tolist() if token != 3] == [
        t for t in ids if t not in (0, 3)
    ]

    order = plain_patch_raster(sample.h, sample.w, p)
    clean = torch.stack([sample.bits[row * sample.w + col] for row, col in order]).float()
    generated = sample.task == "t2i"
    if generated and sample.flip is not None:
        signs = torch.stack([1 - 2 * sample.flip[row * sample.w + col].int() for row, col in order])
        shown = clean * signs
    else:
        shown = clean
    assert torch.equal(batch.vision_bits[vision_here], shown[: len(vision)])
    fed_places = zip(
        batch.vision_rows[vision_here].tolist(), batch.vision_cols[vision_here].tolist(), strict=True
    )
    assert list(fed_places) == order[: len(vision)]

    # Blocks of P from <|res_w|> on: the queries', then one a patch that is fed; the rest is causal.
    first = start + ids.index(3) + 2
    blocks = batch.block_ids[first : first + P + len(vision)].view(-1, P)
    assert (blocks == blocks[:, :1]).all() and len(blocks[:, 0].unique()) == len(blocks)
    assert (batch.block_ids[inside] >= 0).sum() == blocks.numel() and (blocks >= 0).all()

    patches = batch.patch_sample == index
    here = patches.repeat_interleave(P)
    counts = int(patches.sum()) * P, int((batch.text_sample == index).sum())
    assert counts == document_targets(
        len(sample.caption_ids), sample.h, sample.w, sample.task, sample.drop_text
    )
    if generated:
        assert batch.predict_at[here].tolist() == list(range(first, first + sample.h * sample.w))
        predicted = zip(batch.predict_rows[here].tolist(), batch.predict_cols[here].tolist(), strict=True)
        assert list(predicted) == order
        assert torch.equal(batch.target_bits[patches].flatten(0, 1), clean)
        assert torch.equal(batch.t[patches], sample.t) and torch.equal(batch.noise[patches], sample.noise)

    # Text: each label stands right after the place that predicts it, but the <|im_end|> where it is not fed.
    labels = [] if sample.drop_text else [*sample.caption_ids, 2]
    text = batch.text_sample == index
    assert batch.text_labels[text].tolist() == labels
    for place, label in zip((batch.text_at[text] - start + 1).tolist(), labels, strict=True):
        assert ids[place] == label if place < len(ids) else label == 2
    return inside.stop


@settings(max_examples=60, deadline=None)
@given(st.lists(samples, min_size=1, max_size=4))
def test_pack_says_what_the_documents_say(drawn: list[tuple[int, Sample]]) -> None:
    p = drawn[0][0]
    chosen = [sample for other, sample in drawn if other == p]
    batch = pack(chosen, tokens_of(p), p)
    end = 0
    for index, sample in enumerate(chosen):
        end = check_document(batch, end, sample, index, p)
    assert end == len(batch.input_ids) == len(batch.block_ids)
    blocks = batch.block_ids[batch.block_ids >= 0]
    assert len(blocks.unique()) * p * p == len(blocks)  # no two documents share a block number
    assert batch.keys == [sample.key for sample in chosen]


def test_no_samples_pack_into_one_idle_token() -> None:
    batch = pack([], tokens_of(2), 2)
    assert len(batch.input_ids) == 1
    assert not any(len(x) for x in (batch.vision_at, batch.predict_at, batch.t, batch.text_at, batch.keys))


def test_flips_have_their_share_and_their_order_of_draws() -> None:
    flips, generator = draw_flips((400, 400), 0.1, torch.Generator().manual_seed(0)), torch.Generator()
    assert flips.float().mean().item() == pytest.approx(0.05, abs=0.002)
    a, b = torch.rand(2, 400, 400, generator=generator.manual_seed(0))
    assert torch.equal(flips, a < 0.1 * b)


BAD_SAMPLES = {
    "a grid that patches do not tile": (sample_of(3, 4, 2), "can't be cut into 2x2 patches"),
    "a picture that is not its grid": (sample_of(4, 4, 2, bits=torch.ones(8, BITS)), r"bits are \(8, 3\)"),
    "no caption": (sample_of(4, 4, 2, caption_ids=[]), "the caption has no tokens"),
    "nothing to learn": (sample_of(4, 4, 2, task="i2t", drop_text=True), "drop in 't2i' only"),
    "an unknown task": (sample_of(4, 4, 2, task="t2v"), "the task is 't2v'"),
    "no draws": (sample_of(4, 4, 2, t=None), "needs its draws"),
    "draws of another patch size": (sample_of(4, 4, 2, t=torch.rand(16)), "t and noise have the shapes"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples_are_refused_by_key(case: str) -> None:
    sample, message = BAD_SAMPLES[case]
    with pytest.raises(ValueError, match=message) as error:
        pack([sample], tokens_of(2), 2)
    assert "'sample-0'" in str(error.value)


def test_tokens_of_another_patch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="4x4 patches need 15 query tokens, found 3"):
        pack([sample_of(4, 4, 4)], tokens_of(2), 4)


def test_sides_are_bounded() -> None:
    with pytest.raises(ValueError, match="at most 256 tokens"):
        check_grid(4, 260, 4)


def test_sequence_tokens_of_a_text_tokenizer() -> None:
    tokenizer = train_text_tokenizer(["a user and an assistant", "talk"], 300)
    before = len(tokenizer)
    with pytest.raises(ValueError, match="lacks 259 tokens that 2x2 patches need"):
        sequence_tokens(tokenizer, 2)
    assert add_sequence_tokens(tokenizer, 2) == 256 + 3
    assert add_sequence_tokens(tokenizer, 2) == 0
    tokens = sequence_tokens(tokenizer, 2)
    assert (tokens.res[1], tokens.res[256], tokens.query) == (
        before,
        before + 255,
        (before + 256, before + 257, before + 258),
    )
    caption = tokenizer.encode("talk", add_special_tokens=False)
    words = "<|im_start|>user\ntalk<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens.prompt(caption)) == words
    assert tokenizer.decode(tokens.unconditional_prompt()) == "<|im_start|>assistant\n"
    assert tokenizer.decode(tokens.picture_start(8, 4)) == (
        "<|vision_start|><|res_8|><|res_4|><|query_1|><|query_2|><|query_3|>"
    )
    # p = 4 after p = 2: the sides are there, twelve queries more.
    assert add_sequence_tokens(tokenizer, 4) == 12


def test_another_default_device_leaves_nothing_behind() -> None:
    """What is cached is computed on the CPU, wherever the first caller makes its tensors."""
    with torch.device("meta"):  # sizes that no other test asks for
        grid_places(6, 14, 2)
        places = torch.zeros(3, dtype=torch.int64, device="cpu")
        under_meta = position_embedding(places, places, 52)
    rows, cols = grid_places(6, 14, 2)
    assert rows.tolist()[:4] == [0, 0, 1, 1] and cols.tolist()[:4] == [0, 1, 0, 1]
    assert under_meta.tolist() == [([0.0] * 13 + [1.0] * 13) * 2] * 3


def test_patches_that_tile_a_published_size() -> None:
    """1, 2, 4 and 8 tile all; 16 and 32 some, such as 512x1024 or 1024x1024; others none."""
    assert [p for p in range(1, 100) if tiles_published_size(16 * p)] == [1, 2, 4, 8, 16, 32, 64]
