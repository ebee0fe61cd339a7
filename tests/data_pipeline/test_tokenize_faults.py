"""A full disk, a place that cannot be written, bad inputs, two real workers with the same tasks."""

import multiprocessing
import os
import re
import resource
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import tokenize_recipe, tree, write_shards, write_tokenizer

from data_pipeline.finalize import finalize_dataset
from data_pipeline.ingest.storage import StoreUnreachable
from data_pipeline.store import PlaceUnusable
from data_pipeline.tokenize import run as run_module
from data_pipeline.tokenize.run import Slice, parse_slice, run_tokenize
from foundation.errors import DataError, RecipeError
from foundation.ownership import FolderTaken


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four shards of six pictures, tokenized; the inputs are read-only."""
    folder = tmp_path_factory.mktemp("faults")
    write_shards(folder / "shards", 4)
    write_tokenizer(folder / "tokenizer")
    run_tokenize(tokenize_recipe(folder))
    return folder


def without_recipe(folder):
    """Everything that does not say where the output lies."""
    return {name: d for name, d in tree(folder).items() if name not in ("recipe.json", "manifest.json")}


@pytest.mark.parametrize("processes", [0, 2])
def test_a_full_disk_is_said_and_the_job_goes_on_when_there_is_room(made, tmp_path, processes):
    """A real small file system, filled to different degrees, so that the end comes at different points."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    recipe = tokenize_recipe(made, output=str(disk / "latents"), compute={"processes": processes})
    try:
        errors = []
        for free in (4, 40, 110, 180) if processes == 0 else (110,):
            used = sum(p.stat().st_blocks * 512 for p in disk.rglob("*") if p.is_file())
            (disk / "ballast").write_bytes(bytes(max(0, (1 << 20) - used - free * 1024)))
            try:
                run_tokenize(recipe)
            except PlaceUnusable as error:
                errors.append(error)
            for task in (disk / "latents" / "tasks").glob("[0-9]*"):
                assert (task / "done.json").exists(), "a task appears whole or not at all"
            (disk / "ballast").unlink()
        assert errors and all("No space left on device" in str(error) for error in errors)
        assert all(error.exit_code == 78 for error in errors)
        run_tokenize(recipe)
        assert without_recipe(disk / "latents") == without_recipe(made / "latents")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_finalize_on_a_full_disk_is_said_and_goes_on_when_there_is_room(made, tmp_path):
    """All tasks are done; with each page more of free room it comes further."""
    disk, latents = tmp_path / "disk", tmp_path / "disk" / "latents"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        finished = shutil.ignore_patterns("manifest.json", "side-*")
        shutil.copytree(made / "latents", latents, ignore=finished)
        (latents / "index.json").unlink()
        errors = list[PlaceUnusable]()
        for pages in range(200):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            (disk / "ballast").write_bytes(bytes(free - pages * 4096))
            try:
                finalize_dataset(str(latents))
                break
            except PlaceUnusable as error:
                errors.append(error)
            assert not (latents / "manifest.json").exists() and not list(latents.glob(".*"))
            whole = tree(made / "latents")
            assert tree(latents).items() <= whole.items()
            (disk / "ballast").unlink()
        said = r"[^\n]*(No space left on device|The disk is full)[^\n]*"
        assert len(errors) > 5 and all(re.fullmatch(said, str(error)) for error in errors)
        assert all(error.exit_code == 78 for error in errors)
        assert tree(latents) == tree(made / "latents")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_limit_on_file_sizes_is_said_too(made, tmp_path):
    """What a quota does, for those who are not root."""
    recipe = tokenize_recipe(made, output=str(tmp_path / "latents"))

    def limited(answer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            run_tokenize(recipe)
        except PlaceUnusable as error:
            answer.put(str(error))

    answer = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=limited, args=(answer,))
    child.start()
    assert "File too large" in answer.get(timeout=60)
    child.join()
    run_tokenize(recipe)
    assert without_recipe(tmp_path / "latents") == without_recipe(made / "latents")


def test_an_output_that_cannot_be_written_is_said(made, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid():
        disk.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", disk], check=False).returncode:
        pytest.skip("root may write everywhere, and no file system can be mounted")
    try:
        with pytest.raises(PlaceUnusable, match=r"latents.*goes on"):
            run_tokenize(tokenize_recipe(made, output=str(disk / "latents")))
        assert not list(disk.iterdir())
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_tar_that_nothing_can_be_trained_on_leaves_the_output_free(made, tmp_path):
    """The text tokenizer would be trained on the captions of damaged tars: all are told, nothing is begun."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    shutil.copytree(made / "tokenizer", tmp_path / "tokenizer")
    tars = [tmp_path / "shards" / name for name in ("00000.tar", "00002.tar")]
    whole = [tar.read_bytes() for tar in tars]
    for tar in tars:
        os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(DataError, match=r"00000\.tar is (.*)\n.*00002\.tar is "):
        run_tokenize(tokenize_recipe(tmp_path))
    assert not (tmp_path / "latents").exists()
    for tar, data in zip(tars, whole, strict=True):
        tar.write_bytes(data)
    run_tokenize(tokenize_recipe(tmp_path, batch_pixels=9 * 32 * 32))  # another recipe may have the folder


def test_a_first_start_that_fails_takes_nothing_from_what_another_job_has_begun(made, tmp_path, monkeypatch):
    recipe, train = tokenize_recipe(made, output=str(tmp_path / "latents")), run_module.train_and_save

    def away(*arguments):
        monkeypatch.setattr(run_module, "train_and_save", train)
        run_tokenize(recipe, Slice(0, 2))  # the other element begins and plans, and does its slice
        raise StoreUnreachable("s3://captions cannot be reached")

    monkeypatch.setattr(run_module, "train_and_save", away)
    with pytest.raises(StoreUnreachable):
        run_tokenize(recipe, Slice(1, 2))
    run_tokenize(recipe, Slice(1, 2))
    finalize_dataset(recipe.output)
    assert without_recipe(tmp_path / "latents") == without_recipe(made / "latents")


def test_of_two_recipes_that_begin_in_one_folder_the_second_is_refused(made, tmp_path, monkeypatch):
    recipe, train = tokenize_recipe(made, output=str(tmp_path / "latents")), run_module.train_and_save

    def late(*arguments):
        monkeypatch.setattr(run_module, "train_and_save", train)
        run_tokenize(recipe, Slice(0, 4))
        train(*arguments)

    monkeypatch.setattr(run_module, "train_and_save", late)
    with pytest.raises(FolderTaken, match="batch_pixels"):
        run_tokenize(recipe.model_copy(update={"batch_pixels": 9 * 32 * 32}))
    run_tokenize(recipe)
    assert without_recipe(tmp_path / "latents") == without_recipe(made / "latents")


@pytest.mark.parametrize("damage", ["cut short", "zeros inside"])
def test_damaged_kept_rows_are_named_and_leave_nothing(made, tmp_path, damage):
    rows = tmp_path / "kept.parquet"
    table = {"caption": [f"caption {i}" for i in range(2000)], "hash": list(range(2000))}
    pq.write_table(pa.table(table), rows, compression="zstd")
    data = rows.read_bytes()
    rows.write_bytes(
        data[: len(data) // 2] if damage == "cut short" else data[:50] + bytes(2000) + data[2050:]
    )
    keep = {"rows": str(rows), "by": "hash"}
    with pytest.raises(
        DataError, match=rf"{rows}(?!.*memory).*Remove its folder, and `bitdance data filter`"
    ) as error:
        run_tokenize(tokenize_recipe(made, output=str(tmp_path / "latents"), keep=keep))
    assert error.value.exit_code == 65
    assert [path.name for path in tmp_path.iterdir()] == ["kept.parquet"]


def test_two_jobs_at_the_same_time_make_one_dataset(made, tmp_path):
    recipe = tokenize_recipe(made, output=str(tmp_path / "latents"))
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=run_tokenize, args=(recipe,)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0]
    run_tokenize(recipe)
    assert without_recipe(tmp_path / "latents") == without_recipe(made / "latents")


@pytest.mark.parametrize("text", ["3", "3/", "/3", "3/3", "-1/3", "1/2/3", "²/3", "a/b", ""])
def test_slices_that_are_none_are_refused(text):
    with pytest.raises(RecipeError, match="expected I/N"):
        parse_slice(text)
