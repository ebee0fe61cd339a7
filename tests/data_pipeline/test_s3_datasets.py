"""A dataset made on S3: equal to a local one byte for byte, also over a line that fails and dies."""

import hashlib

import pytest
from photo_shards import picture, tokenize_recipe, tree, write_shards, write_tokenizer
from s3_server import SECRET, BadLine, s3_environment, s3_server
from typer.testing import CliRunner

from data_pipeline.cli import app
from data_pipeline.finalize import finalize_dataset
from data_pipeline.ingest import versions
from data_pipeline.ingest.storage import remote_files
from data_pipeline.latents import LatentDataset
from data_pipeline.status import read_status
from data_pipeline.store import open_store
from data_pipeline.tokenize.run import Slice, run_tokenize
from data_pipeline.verify import verify_dataset
from foundation.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def port():
    with s3_server() as port:
        with s3_environment(port):
            remote_files().mkdir("data")
        yield port


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards of four pictures, tokenized into a local folder."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder / "shards", 3, samples=4)
    write_tokenizer(folder / "tokenizer")
    run_tokenize(tokenize_recipe(folder))
    return folder


def remote_tree(address):
    """Name -> sha256 of every file of a dataset on S3."""
    store = open_store(address)
    contents = store.read_many(list(store.files()))
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def but_for_the_recipe(files):
    """Without what says where the dataset lies."""
    return {name: digest for name, digest in files.items() if name not in ("recipe.json", "manifest.json")}


def test_a_dataset_on_s3_equals_a_local_one(port, made, tmp_path, capsys):
    with s3_environment(port):
        recipe = tokenize_recipe(made, output="s3://data/plain/latents")
        run_tokenize(recipe, Slice(0, 2))
        status = read_status(recipe.output)
        assert (status.tasks, status.done, status.finished) == (3, 2, False)
        with pytest.raises(DataError, match="1 of 3 tasks are not done"):
            finalize_dataset(recipe.output)
        run_tokenize(recipe)
        files = remote_tree(recipe.output)
        assert but_for_the_recipe(files) == but_for_the_recipe(tree(made / "latents"))
        verify_dataset(recipe.output, deep=True)
        run_tokenize(recipe)
        assert remote_tree(recipe.output) == files and "done already" in capsys.readouterr().out
        with pytest.raises(RecipeError, match="belongs to another recipe"):
            run_tokenize(tokenize_recipe(made, output=recipe.output, batch_pixels=99999))
        local, remote = LatentDataset(str(made / "latents")), LatentDataset(recipe.output)
        for number in range(local.classes[32].samples):
            assert remote.record(32, number) == local.record(32, number)
        store = open_store(recipe.output)
        written = b"".join(store.read_many(list(files)).values())
        page = tmp_path / "page.html"
        result = CliRunner().invoke(app, ["inspect", recipe.output, "-o", str(page)])
        assert result.exit_code == 0, result.output
        output = capsys.readouterr()
    said = output.out + output.err + result.output + page.read_text() + written.decode("latin-1")
    assert SECRET not in said and "a picture of number 3" in said


def test_local_pictures_of_a_dataset_on_s3_are_not_opened_again(port, made, tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, 64, 64))
        (tmp_path / f"{number}.txt").write_text("a caption")
    section = {"kind": "folder", "path": [str(tmp_path)], "samples_per_shard": 1}
    recipe = tokenize_recipe(made, input=section, output="s3://data/loose/latents", near_duplicates=None)
    monkeypatch.setattr(versions, "MARGIN_SECONDS", -3600.0)  # the pictures are as good as an hour older
    with s3_environment(port):
        run_tokenize(recipe)
        monkeypatch.setattr(versions, "file_version", lambda *_: 1 / 0)
        run_tokenize(recipe)


def test_a_task_without_its_marker_or_with_a_damaged_file_is_done_again(port, made, capsys):
    with s3_environment(port):
        recipe = tokenize_recipe(made, output="s3://data/broken/latents")
        run_tokenize(recipe)
        files = remote_tree(recipe.output)
        store = open_store(recipe.output)
        store.remove(["tasks/00000/done.json", "manifest.json"])
        store.write("tasks/00001/32/shard.00000.mds", b"short")
        with pytest.raises(DataError, match="not finished"):
            verify_dataset(recipe.output)
        run_tokenize(recipe)
        assert "task 00001 does not verify and is done again" in capsys.readouterr().out
        assert remote_tree(recipe.output) == files
        shard = "tasks/00002/64/shard.00000.mds"
        data = bytearray(store.read(shard))
        data[len(data) // 2] ^= 4  # of the same size, so that only `verify` sees it
        for damaged, problem in ((b"short", "has 5 bytes"), (bytes(data), "has another content")):
            store.write(shard, damaged)
            with pytest.raises(DataError, match=rf"s3://data/broken/latents/{shard}: {problem}"):
                verify_dataset(recipe.output)
        run_tokenize(recipe)
        assert "task 00002 does not verify and is done again" in capsys.readouterr().out
        assert remote_tree(recipe.output) == files
        verify_dataset(recipe.output)


def test_finished_over_a_line_that_fails_and_dies(port, made):
    """Inputs and output on S3 behind a server that answers 503 to a tenth, and is gone for five seconds."""
    with s3_environment(port):
        remote_files().put(str(made / "shards") + "/", "s3://data/bad/shards/", recursive=True)
    line = BadLine(port)
    line.die_at = 60
    changes = {
        "input": {"kind": "webdataset", "path": ["s3://data/bad/shards"]},
        "output": "s3://data/bad/latents",
    }
    try:
        with s3_environment(line.port):
            run_tokenize(tokenize_recipe(made, **changes))
            verify_dataset("s3://data/bad/latents")
    finally:
        line.close()
    assert line.deaths == 1 and line.refused >= 5, (line.served, line.refused)
    with s3_environment(port):
        found = but_for_the_recipe(remote_tree("s3://data/bad/latents"))
    expected = but_for_the_recipe(tree(made / "latents"))
    # Plan and markers name the shards by their addresses.
    named = [name for name in expected if name == "plan.json" or name.endswith("done.json")]
    assert {n: d for n, d in found.items() if n not in named} == {
        n: d for n, d in expected.items() if n not in named
    }
    assert set(found) == set(expected)


def test_a_store_that_is_not_there_is_said_in_words(made, monkeypatch, capsys):
    monkeypatch.setattr("data_pipeline.ingest.storage.ATTEMPTS", 2)
    from data_pipeline.ingest.storage import StoreUnreachable

    with s3_environment(1), pytest.raises(StoreUnreachable, match="cannot be reached") as error:
        run_tokenize(tokenize_recipe(made, output="s3://data/none/latents"))
    assert error.value.exit_code == 75 and SECRET not in str(error.value)
