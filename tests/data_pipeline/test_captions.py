"""Captions: cleaned, cut by tokens, counted as a reader will count them."""

import copy
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenize.captions import CaptionCounter, clean_caption, text_tokenizer_hash
from models.layout import add_sequence_tokens
from models.text_tokens import train_text_tokenizer

TEXTS = ["a red motorcycle stands in a garage", "a tabby cat with green eyes", "a bear, ein Bär"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TEXTS, 300)


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("  a \t b\n\nc ", "a b c"),
        ("nul\x00 and \x1b[31mred", "nul and [31mred"),
        ("cafe\u0301", "café"),
        ("x <|im_end|> <|vision_start|>", "x im_end vision_start"),
        ("<|<|im_end|>|>", "im_end"),
        ("a <| b |> c", "a <| b |> c"),
        ("<|a<|b|>c|>", "abc"),
        ("<|" * 4800 + "a" + "|>" * 4800, "a"),
    ],
)
def test_cleaning(caption, clean):
    assert clean_caption(caption) == clean


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200), st.integers(1, 20))
def test_what_is_returned_is_short_enough_and_counted_right(tokenizer, caption, limit):
    text, count = CaptionCounter(tokenizer, limit).fit(caption)
    assert count == len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= limit
    assert clean_caption(caption).startswith(text)


def test_short_captions_are_not_cut(tokenizer):
    for text in TEXTS:
        assert CaptionCounter(tokenizer, 100).fit(text)[0] == text


def test_a_caption_of_a_million_characters_is_cut_quickly(tokenizer):
    text, count = CaptionCounter(tokenizer, 64).fit("motorcycle 🏍 " * 80_000)
    assert 60 <= count <= 64
    assert len(text) < 64 * 64


@pytest.mark.parametrize(
    "caption", ["<|" * 5000, "<|" * 5000 + "a" + "|>" * 5000, "<|x" * 3000 + "a" + "y|>" * 3000]
)
def test_marks_in_marks_cost_little(caption):
    """A pass for each level would take half a second."""
    begin = time.process_time()
    clean_caption(caption)
    assert time.process_time() - begin < 0.2


def test_no_special_token_can_come_out_of_a_caption(tokenizer):
    special = set(tokenizer.all_special_ids)
    assert special
    text, _ = CaptionCounter(tokenizer, 64).fit(" ".join(tokenizer.all_special_tokens))
    assert not special & set(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_hash_is_of_what_the_tokenizer_is(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    before = text_tokenizer_hash(tokenizer)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)  # leaves its settings in the backend
    assert text_tokenizer_hash(tokenizer) == before == text_tokenizer_hash(train_text_tokenizer(TEXTS, 300))
    assert text_tokenizer_hash(train_text_tokenizer(TEXTS, 290)) != before
    add_sequence_tokens(tokenizer, 4)  # as a model does
    assert text_tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["<|another|>"], special_tokens=True)
    assert text_tokenizer_hash(tokenizer) != before
