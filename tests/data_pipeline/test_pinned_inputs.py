"""What tasks are made of may not change between the runs of a job: one dataset never holds two kinds."""

import shutil

import pytest
from photo_shards import tokenize_recipe, tree, write_kept, write_shards, write_tokenizer

from data_pipeline.tokenize.run import Slice, run_tokenize
from foundation.errors import RecipeError
from models.text_tokens import train_text_tokenizer


@pytest.fixture
def work(tmp_path):
    write_shards(tmp_path / "shards", 2, samples=2)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def write_text_tokenizer(folder, size):
    train_text_tokenizer(["a picture of number in a frame"] * 9, size).save_pretrained(str(folder))


def test_kept_rows_that_were_replaced_are_refused(work):
    write_kept(work / "kept.parquet", [f"first words of {n}" for n in range(4)])
    recipe = tokenize_recipe(work, keep={"rows": str(work / "kept.parquet"), "by": "hash"})
    run_tokenize(recipe, Slice(0, 2))
    before = tree(work / "latents")
    shutil.move(work / "kept.parquet", work / "first.parquet")
    write_kept(work / "kept.parquet", [f"other words of {n}" for n in range(4)])
    with pytest.raises(RecipeError, match=r"kept\.parquet were replaced since .*latents was begun"):
        run_tokenize(recipe)
    assert tree(work / "latents") == before
    shutil.copy(work / "first.parquet", work / "kept.parquet")  # with a time of its own
    run_tokenize(recipe)
    assert (work / "latents" / "manifest.json").exists()


def test_a_text_tokenizer_that_was_replaced_is_refused(work):
    write_text_tokenizer(work / "text", 300)
    recipe = tokenize_recipe(work, text_tokenizer={"name": str(work / "text")})
    run_tokenize(recipe, Slice(2, 3))  # begins, and has no task to do
    before = tree(work / "latents")
    shutil.rmtree(work / "text")
    write_text_tokenizer(work / "text", 270)
    with pytest.raises(RecipeError, match=r"text tokenizer .*text is another one than when .*latents"):
        run_tokenize(recipe)
    assert tree(work / "latents") == before
