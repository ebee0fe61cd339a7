"""A file system that fails for a while ends the job, to be started again; no shard is blamed."""

import errno
import os

import pytest
from photo_shards import tokenize_recipe, write_shards, write_tokenizer

from data_pipeline.ingest.storage import StoreUnreachable
from data_pipeline.tokenize.run import run_tokenize
from data_pipeline.tokenize.task import TaskRunner


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
