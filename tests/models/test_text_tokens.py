"""The small byte-level BPE: lossless, with Qwen's special tokens, the same after a trip through a folder."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers import models as pieces
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.tokenize.captions import clean_caption, text_tokenizer_hash
from models.layout import add_sequence_tokens, encode_prompt, sequence_tokens
from models.text_tokens import (
    QWEN_SPECIAL_TOKENS,
    load_text_tokenizer,
    train_text_tokenizer,
)

CAPTIONS = [
    "a cat on a red sofa",
    "a cup of coffee on a wooden table",
    "a rocket on its launch pad at night",
    "the retina of a human eye",
]
TOKENIZER = train_text_tokenizer(CAPTIONS, vocab_size=400)


@given(st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    for special in QWEN_SPECIAL_TOKENS:
        composed = composed.replace(special, "")
    ids = TOKENIZER.encode(composed, add_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == composed
    assert all(0 <= i < len(TOKENIZER) for i in ids)


def test_merges_are_learned_from_the_texts() -> None:
    seen = TOKENIZER.encode("a cup of coffee on a wooden table", add_special_tokens=False)
    unseen = TOKENIZER.encode("zq xkw jvq zzyxqk vw xq jkzvw qzx", add_special_tokens=False)
    assert len(seen) <= 10
    assert len(unseen) >= 20


def test_special_tokens_are_single_ids_after_all_pieces_and_nothing_is_added_to_a_text() -> None:
    ids = [TOKENIZER.convert_tokens_to_ids(token) for token in QWEN_SPECIAL_TOKENS]
    first = len(TOKENIZER) - len(QWEN_SPECIAL_TOKENS)
    assert sorted(ids) == list(range(first, len(TOKENIZER)))
    for token, token_id in zip(QWEN_SPECIAL_TOKENS, ids, strict=True):
        assert TOKENIZER.encode(f"a{token}b", add_special_tokens=False)[1] == token_id
    assert TOKENIZER.encode("a cat") == TOKENIZER.encode("a cat", add_special_tokens=False)
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = train_text_tokenizer(iter(CAPTIONS), vocab_size=400)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_a_folder_brings_it_back_whole_for_us_and_for_plain_transformers(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    text = "<|im_start|>user\na cat\nat night<|im_end|>"
    for loaded in (load_text_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert loaded.eos_token == "<|im_end|>"


def test_a_folder_with_vocab_and_merges_is_the_same_tokenizer(tmp_path: Path) -> None:
    """Models come so, too. Saved, it has a `tokenizer.json`, and is the same to datasets and models."""
    TOKENIZER.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]))
    with pytest.raises(ValueError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("".join(f"{' '.join(merge)}\n" for merge in whole["merges"]))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_text_tokenizer(tmp_path)
    text = "<|im_start|>user\na cat at night, 12 e\u0301<|im_end|>"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    loaded.save_pretrained(tmp_path / "saved")
    assert text_tokenizer_hash(load_text_tokenizer(tmp_path / "saved")) == text_tokenizer_hash(loaded)


def test_the_vocabulary_never_exceeds_what_was_asked() -> None:
    assert len(train_text_tokenizer(CAPTIONS, vocab_size=270)) == 270
    assert len(train_text_tokenizer(CAPTIONS, vocab_size=300)) == 300
    assert len(train_text_tokenizer(["ab"], vocab_size=10_000)) < 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 100; expected at least 270"):
        train_text_tokenizer(CAPTIONS, vocab_size=100)


def test_what_is_no_tokenizer_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_text_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer\.json, nor"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_text_tokenizer(tmp_path)


def test_a_tokenizer_of_another_family_is_refused(tmp_path: Path) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(pieces.BPE(vocab={"a": 0}, merges=[])))
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|endoftext\|>, <\|im_start\|>"):
        load_text_tokenizer(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    text = config.read_text()
    config.write_text(text.replace("{", '{"auto_map": {"AutoTokenizer": [null, "evil.Evil"]},', 1))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    try:
        load_text_tokenizer(tmp_path)
    except ValueError as error:
        assert "cannot be loaded" in str(error)  # noqa: PT017 (either outcome is fine, running it is not)
    assert not (tmp_path / "pwned").exists()


# Of texts in which line breaks join.
JOINING = train_text_tokenizer([*CAPTIONS, *["one\n\n two"] * 9], vocab_size=400)
add_sequence_tokens(JOINING, 2)


def test_a_prompt_is_encoded_as_one_text() -> None:
    """A line break at the beginning of a caption becomes one token with that of the template."""
    ids = encode_prompt(JOINING, "\n a cat")
    assert JOINING.decode(ids) == "<|im_start|>user\n\n a cat<|im_end|>\n<|im_start|>assistant\n"
    assert JOINING.get_vocab()["ĊĊ"] in ids
    caption = JOINING.encode("\n a cat", add_special_tokens=False)
    assert ids != sequence_tokens(JOINING, 2).prompt(caption)


@given(st.text(max_size=40).map(clean_caption).filter(bool))
def test_prompts_of_captions_are_those_of_training(text: str) -> None:
    caption = JOINING.encode(text, add_special_tokens=False)
    assert encode_prompt(JOINING, text) == sequence_tokens(JOINING, 2).prompt(caption)
