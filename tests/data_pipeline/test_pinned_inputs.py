"""What tasks are made of may not change between the runs of a job: one dataset never holds two kinds."""

import os
import shutil

import pytest
from photo_shards import tokenize_recipe, tree, write_kept, write_shards, write_tokenizer

from data_pipeline.tokenize import task as task_module
from data_pipeline.tokenize.marker import marker_text, parse_marker
from data_pipeline.tokenize.run import Slice, run_tokenize
from foundation.errors import DataError, RecipeError
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


def test_a_shard_of_equal_size_that_was_replaced_is_noticed_and_a_touched_or_copied_one_is_the_same(work):
    """Tars are padded to 10 KiB, so that another content often has the same size."""
    recipe = tokenize_recipe(work, near_duplicates=None)
    run_tokenize(recipe)
    shard = sorted((work / "shards").glob("*.tar"))[1]
    whole = shard.read_bytes()
    os.utime(shard)
    run_tokenize(recipe)
    shard.unlink()
    shard.write_bytes(whole)
    run_tokenize(recipe)
    old = shard.stat().st_mtime - 1e6
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    os.utime(shard, (old, old))  # by a copy that keeps times
    with pytest.raises(DataError, match=rf"task 00001: .*{shard.name} has changed since\n(.|\n)*remove"):
        run_tokenize(recipe)


def test_a_shard_that_changes_while_it_is_read_fails_its_task(work, monkeypatch):
    shard = sorted((work / "shards").glob("*.tar"))[0]
    whole = shard.read_bytes()

    def late(task):
        if task.shard.path == str(shard):
            shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
        return marker(task)

    marker = task_module._Task._marker
    monkeypatch.setattr(task_module._Task, "_marker", late)
    with pytest.raises(DataError, match=rf"1 of . tasks failed(.|\n)*{shard.name} changed while it was read"):
        run_tokenize(tokenize_recipe(work, near_duplicates=None))
    assert not (work / "latents" / "tasks" / "00000").exists()


def test_markers_of_before_shards_had_versions_are_read(work):
    recipe = tokenize_recipe(work, near_duplicates=None)
    run_tokenize(recipe)
    for path in (work / "latents" / "tasks").glob("*/done.json"):
        marker = parse_marker(path.read_bytes())
        del marker["shard_version"]
        path.write_bytes(marker_text(marker))
    before = tree(work / "latents")
    run_tokenize(recipe)
    assert tree(work / "latents") == before
