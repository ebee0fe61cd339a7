"""p = 4 to p = 8: new query rows near the mean of the old ones, everything else as it was."""

from pathlib import Path

import pytest
import tiny_models as cases
import torch

from models.weights import grow_patch, load_folder, open_folder, save_folder, stored_specs, write_source
from models.weights.layout import EMBEDDING, OUTPUT

TOKENIZER = cases.text_tokenizer(4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 5, 100])
def test_only_the_new_queries_change(tmp_path: Path, tied: bool, padding: int) -> None:
    rows = len(TOKENIZER) + padding
    before = cases.text_to_image(rows, tied=tied)
    save_folder(before, TOKENIZER, tmp_path)
    grown = load_folder(tmp_path, p=8, seed=3)
    after = grown.model.state_dict()

    old = [TOKENIZER.convert_tokens_to_ids(f"<|query_{i}|>") for i in range(1, 16)]
    new = [grown.text_tokenizer.convert_tokens_to_ids(f"<|query_{i}|>") for i in range(16, 64)]
    assert new == list(range(len(TOKENIZER), len(TOKENIZER) + 48))
    assert grown.tokens.query == (*old, *new)
    assert len(grown.text_tokenizer) == len(TOKENIZER) + 48
    assert grown.model.config.p == 8
    assert grown.model.config.llm.vocab_size == max(rows, len(TOKENIZER) + 48)

    for name, value in before.state_dict().items():
        if name not in (EMBEDDING, OUTPUT):
            assert torch.equal(value, after[name]), name
            continue
        assert after[name].shape[0] == max(rows, len(TOKENIZER) + 48)
        kept = [row for row in range(rows) if row not in new]
        assert torch.equal(after[name][kept], value[kept])
        mean, spread = value[old].mean(0), (value[old] - value[old].mean(0)).square().mean().sqrt()
        noise = (after[name][new] - mean) / spread
        assert noise.std().item() == pytest.approx(0.1, rel=0.1)
        assert abs(noise.mean().item()) < 0.01
        assert torch.pdist(noise).min() > 0.1  # no two new queries are alike
    if not tied:
        assert not torch.equal(after[EMBEDDING][new] - after[EMBEDDING][old].mean(0), after[OUTPUT][new])


def test_the_seed_decides_the_noise_and_the_source_stays(tmp_path: Path) -> None:
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, tmp_path)
    source = open_folder(tmp_path)

    def embedding(seed: int) -> torch.Tensor:
        return dict(grow_patch(source, 8, seed).tensors())[EMBEDDING]

    assert torch.equal(embedding(0), embedding(0))
    assert not torch.equal(embedding(0), embedding(1))
    assert source.config.p == 4
    assert "<|query_16|>" not in source.text_tokenizer.get_vocab()


def test_a_grown_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    save_folder(cases.text_to_image(len(TOKENIZER)), TOKENIZER, tmp_path / "small")
    write_source(grow_patch(open_folder(tmp_path / "small"), 8), tmp_path / "large")
    loaded, direct = load_folder(tmp_path / "large"), load_folder(tmp_path / "small", p=8)
    cases.assert_same(loaded.model, direct.model)
    assert stored_specs(loaded.model)[EMBEDDING].shape == (len(TOKENIZER) + 48, 64)
    assert load_folder(tmp_path / "small", p=4).model.config.p == 4


@pytest.mark.parametrize(
    ("own", "wanted", "message"),
    [(4, 2, "expected a p larger"), (4, 257, "at most 256"), (1, 4, "no query tokens")],
)
def test_what_cannot_grow_is_refused(tmp_path: Path, own: int, wanted: int, message: str) -> None:
    tokenizer = cases.text_tokenizer(own)
    save_folder(cases.text_to_image(len(tokenizer), p=own), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path, p=wanted)
