"""A file system that fails for a while ends the job, to be started again; no shard is blamed."""

import errno
import os
from unittest.mock import MagicMock

import pytest
from photo_shards import tokenize_recipe, write_shards, write_tokenizer

from data_pipeline.ingest import storage, versions
from data_pipeline.ingest.storage import StoreUnreachable
from data_pipeline.status import clear_failures, read_status
from data_pipeline.tokenize.run import run_tokenize
from data_pipeline.tokenize.task import TaskRunner
from foundation.errors import DataError
from models.text_tokens import train_text_tokenizer


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_system_that_fails_for_a_while_fails_no_task(tmp_path, monkeypatch, number):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    write_shards(tmp_path / "shards", 1, samples=1)
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(TaskRunner, "run", failing)
    with pytest.raises(StoreUnreachable, match=r"00000\.tar: .*; the same command goes on") as error:
        run_tokenize(tokenize_recipe(tmp_path))
    assert error.value.exit_code == 75
    assert not (tmp_path / "latents" / "failed").exists()


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_shard_that_may_not_be_read_fails_its_task_alone(tmp_path, monkeypatch, when):
    write_shards(tmp_path / "shards", 3, samples=1)
    write_tokenizer(tmp_path / "tokenizer")
    train_text_tokenizer(["a picture of number in a frame"] * 9, 300).save_pretrained(str(tmp_path / "text"))
    recipe = tokenize_recipe(tmp_path, text_tokenizer={"name": str(tmp_path / "text")})
    shard = str(tmp_path / "shards" / "00001.tar")

    def denied(path, *arguments, **more):
        if path != shard:
            return open(path, *arguments, **more)
        if when == "opened":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        stream = MagicMock()
        stream.__enter__.return_value.read.side_effect = PermissionError(errno.EACCES, "Permission denied")
        return stream

    def version(path, *part):
        return "as it was" if path == shard else storage.file_version(path, *part)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", denied, raising=False)
        if when == "read":
            patch.setattr(versions, "file_version", version)
        with pytest.raises(
            DataError, match=rf"1 of 3 tasks failed.*\n  task 00001: {shard} cannot be read: Perm"
        ):
            run_tokenize(recipe)
    assert read_status(tmp_path / "latents").done == 2
    clear_failures(tmp_path / "latents")
    run_tokenize(recipe)
    assert read_status(tmp_path / "latents").finished
