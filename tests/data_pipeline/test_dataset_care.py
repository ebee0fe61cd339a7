"""Status, retry and verify; and kill -9 at any point of a tokenize job."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys

import pytest
from photo_shards import tokenize_recipe, tree, write_shards, write_tokenizer

from data_pipeline.finalize import finalize_dataset
from data_pipeline.status import clear_failures, read_status
from data_pipeline.tokenize.run import Slice, run_tokenize
from data_pipeline.verify import verify_dataset
from foundation.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four shards of four pictures, tokenized; read-only."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder / "shards", 4, samples=4)
    write_tokenizer(folder / "tokenizer")
    run_tokenize(tokenize_recipe(folder))
    return folder


@pytest.fixture
def dataset(made, tmp_path):
    """A copy of the finished dataset, to damage."""
    return shutil.copytree(made / "latents", tmp_path / "latents")


def test_a_good_dataset_verifies(made, capsys):
    verify_dataset(made / "latents", deep=True)
    assert "8 shards and 32 samples verify" in capsys.readouterr().out


def test_every_single_damage_is_found_and_named(dataset):
    """Any byte of any file that readers rely on: flipped, or cut off."""
    # Recipe and plan are compared by what they say.
    names = [name for name in tree(dataset) if name not in ("recipe.json", "plan.json")]
    # Shards, their indexes, tables, markers, quarantines; side index, text tokenizer, index and manifest.
    assert len(names) == 8 + 8 + 4 + 4 + 4 + 8 + 3 + 2
    rng = random.Random(0)
    for name in names:
        path = dataset / name
        if not (whole := path.read_bytes()):
            continue  # a quarantine list without a line
        place = rng.randrange(len(whole))
        for damaged in (whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :], whole[:-1]):
            path.write_bytes(damaged)
            if name == "manifest.json" and damaged == whole[:-1]:
                continue  # only its last line's end
            with pytest.raises(DataError, match=re.escape(name)):
                verify_dataset(dataset)
        path.write_bytes(whole)
    verify_dataset(dataset)


def test_several_bad_shards_are_all_named(dataset):
    (dataset / "tasks/00001/32/shard.00000.mds").unlink()
    (dataset / "tasks/00003/64/shard.00000.mds").write_bytes(b"x")
    with pytest.raises(DataError) as error:
        verify_dataset(dataset)
    for part in ("tasks/00001/32/shard.00000.mds: is missing", "tasks/00003/64/shard.00000.mds: has 1 bytes"):
        assert part in str(error.value)


def test_a_pickle_column_is_named_and_never_read(dataset):
    """Neither the encoding is accepted, nor what it stands for run."""
    path = dataset / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["column_encodings"][0] = "pkl"
    path.write_text(json.dumps(index, sort_keys=True))
    manifest = json.loads((dataset / "manifest.json").read_text())
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest["files"]["index.json"] = entry
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"shard\.00000\.mds: its columns are .*'pkl'"):
        verify_dataset(dataset, deep=True)


def test_what_is_not_finished_does_not_verify(dataset):
    (dataset / "manifest.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        verify_dataset(dataset)
    before = tree(dataset)
    finalize_dataset(str(dataset))
    verify_dataset(dataset)
    after = tree(dataset)
    assert {name: after[name] for name in before} == before


def test_status_and_retry(tmp_path):
    write_shards(tmp_path / "shards", 4, samples=4, bad=(4, 5, 6))
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="has begun"):
        read_status(tmp_path / "latents")
    run_tokenize(tokenize_recipe(tmp_path), Slice(0, 4))
    first = read_status(tmp_path / "latents")
    assert (first.tasks, first.done, first.failed, first.counts["read"], first.finished) == (
        4,
        1,
        {},
        4,
        False,
    )
    with pytest.raises(DataError, match="1 of 4 tasks failed"):
        run_tokenize(tokenize_recipe(tmp_path))
    status = read_status(tmp_path / "latents")
    assert (status.done, status.running, status.counts["read"], list(status.failed)) == (3, 0, 12, [1])
    assert "3 of 4 samples cannot be used" in status.failed[1]
    assert status.samples_per_second and status.seconds_left == 0  # a failed task is not tried again
    assert clear_failures(tmp_path / "latents") == 1
    status = read_status(tmp_path / "latents")
    # A task's seconds are its four samples', at the rate of the others.
    assert status.failed == {} and status.seconds_left == pytest.approx(4 / status.samples_per_second)


def killed_run(recipe, calls):
    """Run the job in a child that is killed at its `calls`-th write-like system call; whether it was."""
    child = os.fork()
    if child == 0:
        left = [calls]

        def count(event, _arguments):
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            run_tokenize(recipe)
        finally:
            os._exit(0)
    _, result = os.waitpid(child, 0)
    return os.WIFSIGNALED(result)


def test_killed_twenty_times_then_equal_to_an_undisturbed_run(made, tmp_path):
    """Jobs that are killed again and again, each time at another point, until they come to their end."""
    before = tree(made / "latents")
    shutil.move(made / "latents", tmp_path / "kept")
    recipe = tokenize_recipe(made)
    rng = random.Random(7)
    kills = finished = 0
    try:
        while kills < 20:
            kills += killed_run(recipe, calls=rng.randint(1, 250))
            for done in (made / "latents" / "tasks").glob("[0-9]*"):
                assert (done / "done.json").exists(), "a task folder appears whole or not at all"
            if (made / "latents" / "manifest.json").exists():
                run_tokenize(recipe)
                assert tree(made / "latents") == before
                shutil.rmtree(made / "latents")
                finished += 1
        assert finished >= 2
    finally:
        shutil.rmtree(made / "latents", ignore_errors=True)
        shutil.move(tmp_path / "kept", made / "latents")
