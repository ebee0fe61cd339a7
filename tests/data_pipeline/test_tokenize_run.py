"""Tokenizing: what is written, reruns, refusals, damage; with a real (tiny, random) tokenizer."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from photo_shards import SIZES, picture, tokenize_recipe, tree, write_shards, write_tar, write_tokenizer
from typer.testing import CliRunner

from data_pipeline.buckets import fit_to_bucket
from data_pipeline.cli import app
from data_pipeline.images import decode_image
from data_pipeline.latents import LatentDataset
from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.records import unpack_bits
from data_pipeline.status import print_status, read_status
from data_pipeline.tokenize.folder import FAILED, DatasetFolder
from data_pipeline.tokenize.run import Slice, run_tokenize
from data_pipeline.verify import verify_dataset
from foundation.errors import DataError, RecipeError
from models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards of six pictures, tokenized; read-only."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder / "shards", 3)
    write_tokenizer(folder / "tokenizer")
    run_tokenize(tokenize_recipe(folder))
    return folder


@pytest.fixture
def work(made, tmp_path):
    """A copy of the made folder's inputs, to break."""
    shutil.copytree(made / "shards", tmp_path / "shards")
    shutil.copytree(made / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def records(folder):
    dataset = LatentDataset(str(folder))
    return {
        (resolution, record.key): record
        for resolution, index in dataset.classes.items()
        for record in (dataset.record(resolution, i) for i in range(len(index.n_text)))
    }


def test_every_picture_is_in_every_class_that_it_is_big_enough_for(made):
    found = records(made / "latents")
    grids = {(r, key): (record.h, record.w) for (r, key), record in found.items()}
    expected = {}
    for number in range(18):
        key = f"{number // 6:05d}{number % 6:04d}"
        expected[32, key] = (2, 2)
        height, width = SIZES[number % 6]
        if (height, width) == (40, 80):
            expected[64, key] = (2, 4)
        elif (height, width) == (90, 45):
            expected[64, key] = (4, 2)
        elif min(height, width) >= 64:
            expected[64, key] = (4, 4)
    assert grids == expected


def test_bits_are_those_of_the_tokenizer_on_the_fitted_picture(made):
    tokenizer = load_tokenizer(made / "tokenizer")
    found = records(made / "latents")
    agreement = []
    for (resolution, key), record in found.items():
        number = int(key[:5]) * 6 + int(key[5:])
        image = decode_image(picture(number, *SIZES[number % 6]), 10**6)
        pixels = fit_to_bucket(image, record.h * 16, record.w * 16)
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            bits = tokenizer.encode(x)[0].permute(1, 2, 0).reshape(-1, 16)
        agreement.append((unpack_bits(record.bits, record.h, record.w, 16) == bits.numpy()).mean())
        assert record.caption == f"a picture of number {number} in a frame"
        assert record.scores == {"aesthetic": 5.0}
        assert resolution in (32, 64)
    # Batches round differently; a bit may flip where the encoder's output is next to zero.
    assert min(agreement) > 0.98


def test_the_side_index_agrees_with_the_records(made):
    dataset = LatentDataset(str(made / "latents"))
    for resolution, index in dataset.classes.items():
        buckets = next(c.buckets for c in dataset.manifest.classes if c.resolution == resolution)
        for i in range(len(index.n_text)):
            record = dataset.record(resolution, i)
            assert record.n_text == index.n_text[i]
            assert buckets[index.bucket[i]] == (record.h * 16, record.w * 16)
        assert int(np.sum(index.shard_sizes)) == len(index.n_text)


def test_a_rerun_changes_nothing_and_a_removed_task_comes_back_the_same(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    recipe = tokenize_recipe(made)  # paths as in the record; the copy is only looked at
    before = tree(made / "latents")
    run_tokenize(recipe)
    assert tree(made / "latents") == before
    shutil.rmtree(made / "latents" / "tasks" / "00001")
    run_tokenize(recipe)
    assert tree(made / "latents") == before


def test_a_damaged_task_is_done_again(made):
    before = tree(made / "latents")
    shard = made / "latents" / "tasks" / "00002" / "32" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-7])
    run_tokenize(tokenize_recipe(made))
    assert tree(made / "latents") == before


def test_slices_then_a_whole_run_equal_one_run(work, made):
    recipe = tokenize_recipe(work)
    run_tokenize(recipe, Slice(1, 2))
    assert not (work / "latents" / "manifest.json").exists()
    run_tokenize(recipe, Slice(0, 3))
    run_tokenize(recipe)
    tasks, others = (tree(folder / "latents" / "tasks") for folder in (work, made))
    markers = [name for name in tasks if name.endswith("done.json")]
    assert len(markers) == 3
    # Markers name the input's path, which differs between the two folders.
    assert {n: h for n, h in tasks.items() if n not in markers} == {
        n: h for n, h in others.items() if n not in markers
    }


def test_worker_processes_write_the_same(work, made):
    run_tokenize(tokenize_recipe(work, compute={"processes": 2, "decoders": 1}))
    one, other = (tree(folder / "latents") for folder in (work, made))
    same = [name for name in one if name.endswith((".mds", ".parquet", ".npy"))]
    assert len(same) == 17
    assert {n: one[n] for n in same} == {n: other[n] for n in same}


def test_another_recipe_is_refused_naming_the_keys(made):
    before = tree(made / "latents")
    with pytest.raises(RecipeError, match=r'assign: "every" -> "largest"'):
        run_tokenize(tokenize_recipe(made, assign="largest"))
    with pytest.raises(RecipeError, match=r"classes\.0\.buckets"):
        classes = [{"resolution": 32, "buckets": [[32, 48]]}, {"resolution": 64, "buckets": [[64, 64]]}]
        run_tokenize(tokenize_recipe(made, classes=classes))
    assert tree(made / "latents") == before


def test_another_tokenizer_or_other_shards_are_refused(work):
    run_tokenize(tokenize_recipe(work), Slice(0, 3))
    write_shards(work / "shards", 4)
    with pytest.raises(RecipeError, match=r"1 are new and 0 gone \(such as .*00003\.tar"):
        run_tokenize(tokenize_recipe(work))
    (work / "shards" / "00003.tar").unlink()
    write_tokenizer(work / "tokenizer", seed=1)
    with pytest.raises(RecipeError, match="has other weights than when"):
        run_tokenize(tokenize_recipe(work))


def test_problems_of_a_recipe_come_together(work):
    classes = [{"resolution": 32, "buckets": [[32, 40]]}, {"resolution": 64, "buckets": [[65, 64]]}]
    with pytest.raises(RecipeError) as error:
        run_tokenize(tokenize_recipe(work, classes=classes, keep={"rows": "nowhere.parquet", "by": "hash"}))
    for part in (
        "3 problems",
        "[32, 40] is not a multiple of 16",
        "[65, 64]",
        "nowhere.parquet does not exist",
    ):
        assert part in str(error.value)
    assert not (work / "latents").exists()


def test_what_does_not_fit_the_tokenizer_is_told_with_all_other_mistakes(work):
    values = tokenize_recipe(work).model_dump(mode="json")
    values |= {"classes": [{"resolution": 32, "buckets": [[32, 40]]}], "keep": {"rows": "none", "by": "uid"}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(values | {"batchpixels": 1, "dtype": "float31"}))
    result = CliRunner().invoke(app, ["tokenize", str(work / "recipe.yaml")])
    assert isinstance(result.exception, RecipeError)
    for part in ("4 problems", "[32, 40] is not a multiple of 16", "none does not", "batchpixels", "float31"):
        assert part in str(result.exception)
    (work / "recipe.yaml").write_text(yaml.safe_dump(values | {"tokenizer": str(work), "dtype": "float31"}))
    result = CliRunner().invoke(app, ["tokenize", str(work / "recipe.yaml")])
    for part in ("3 problems", "tokenizer: ", "ae_config.json", "none does not", "float31"):
        assert part in str(result.exception)


def test_largest_takes_each_picture_once(work):
    run_tokenize(tokenize_recipe(work, assign="largest"))
    found = records(work / "latents")
    assert len(found) == 18
    assert {r for r, key in found if key.endswith("4")} == {32}  # 33 x 32
    assert {r for r, key in found if key.endswith("0")} == {64}


def test_flips_are_extra_samples_and_no_near_duplicates(work):
    run_tokenize(tokenize_recipe(work, pictures={"flips": True}, assign="largest"))
    found = records(work / "latents")
    assert len(found) == 36
    plain, mirrored = found[64, "000000000"], found[64, "000000000-flip"]
    assert plain.bits != mirrored.bits
    assert plain.caption == mirrored.caption


@pytest.mark.parametrize("processes", [0, 2])
def test_only_kept_rows_with_the_filters_captions(work, processes):
    rows = [
        {"url": f"u{n}", "text": f"better {n}", "hash": n, "AESTHETIC_SCORE": n / 2} for n in (0, 7, 8, 99)
    ]
    pq.write_table(pa.Table.from_pylist(rows), work / "rows.parquet")
    rules = [{"rule": "score", "column": "aesthetic", "above": 0.0}]
    run_filter(
        FilterRecipe.model_validate(
            {"sources": [str(work / "rows.parquet")], "output": str(work / "kept"), "rules": rules}
        )
    )
    keep = {"rows": str(work / "kept" / "kept.parquet"), "by": "hash"}
    compute = {"processes": processes}
    run_tokenize(tokenize_recipe(work, keep=keep, assign="largest", compute=compute))
    found = records(work / "latents")
    assert {(r.caption, r.scores["aesthetic"]) for r in found.values()} == {
        ("better 7", 3.5),
        ("better 8", 4.0),
    }


def test_corrupt_images_are_quarantined_below_the_fraction(work, capsys):
    write_shards(work / "shards", 3, bad={7})
    run_tokenize(tokenize_recipe(work))
    assert f" 1 refused (which and why: {work}/latents/tasks/*/quarantine.jsonl)\n" in capsys.readouterr().out
    dataset = LatentDataset(str(work / "latents"))
    assert dataset.manifest.quarantined == 1
    line = json.loads((work / "latents" / "tasks" / "00001" / "quarantine.jsonl").read_text())
    assert line["key"] == "000010001" and "not a picture" in line["reason"]
    assert (32, "000010001") not in records(work / "latents")


def test_too_many_corrupt_images_fail_their_task_alone(work):
    write_shards(work / "shards", 3, bad={7, 8})
    with pytest.raises(DataError) as error:
        run_tokenize(tokenize_recipe(work))
    message = str(error.value)
    assert "1 of 3 tasks failed" in message and "2 of 6 samples cannot be used" in message
    assert "000010001: not a picture" in message
    folder = DatasetFolder(work / "latents")
    assert [folder.read_done(n) is not None for n in range(3)] == [True, False, True]
    assert not folder.partials() and not (work / "latents" / "manifest.json").exists()
    with pytest.raises(DataError, match="failed earlier"):
        run_tokenize(tokenize_recipe(work))
    folder.forget(1, FAILED)
    shutil.copy(work / "shards" / "00000.tar", work / "shards" / "00001.tar")
    run_tokenize(tokenize_recipe(work))
    assert (work / "latents" / "manifest.json").exists()


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"rubbish" * 99])
def test_a_damaged_tar_is_named_and_the_others_are_done(work, damage):
    tar = work / "shards" / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(damage(whole))
    with pytest.raises(
        DataError, match=r"task 00001: .*00001\.tar is no tar, damaged or cut short|damaged or cut"
    ):
        run_tokenize(tokenize_recipe(work))
    assert not DatasetFolder(work / "latents").partials()
    tar.write_bytes(whole)  # mended: tried again without being asked, as its size is another
    run_tokenize(tokenize_recipe(work))
    assert len(records(work / "latents")) == 33


def test_no_shards_an_empty_shard_and_an_unfinished_one(work):
    with pytest.raises(DataError, match="no pictures of kind 'webdataset' there"):
        run_tokenize(tokenize_recipe(work, input={"path": [str(work / "nothing")]}))
    (work / "shards" / "00001.tar").write_bytes(b"")
    (work / "shards" / "00002_stats.json").unlink()
    with pytest.raises(DataError) as error:
        run_tokenize(tokenize_recipe(work))
    assert "00001.tar: is empty" in str(error.value) and "has no 00002_stats.json" in str(error.value)
    assert not (work / "latents").exists()


def test_two_workers_with_the_same_task(work, monkeypatch):
    """The second finds the task committed when it comes to commit its own: it gives way."""
    from data_pipeline import store as module

    real = module.commit_folder

    def slower(partial, final):
        if not final.exists():
            shutil.copytree(partial, final)  # the other worker was faster
        real(partial, final)

    monkeypatch.setattr(module, "commit_folder", slower)
    run_tokenize(tokenize_recipe(work))
    assert len(records(work / "latents")) == 33
    assert not DatasetFolder(work / "latents").partials()


def test_a_replaced_shard_is_noticed(work):
    run_tokenize(tokenize_recipe(work), Slice(0, 1))
    shutil.copy(work / "shards" / "00000.tar", work / "shards" / "00001.tar")
    with open(work / "shards" / "00001.tar", "ab") as tar:
        tar.write(bytes(1024))
    with pytest.raises(DataError, match=r"task 00001: .*00001\.tar has changed since(?![\s\S]*retry)"):
        run_tokenize(tokenize_recipe(work))


def test_a_shard_without_samples_is_a_task_without_records(work, capsys):
    """As the downloader leaves one of which no picture could be had."""
    write_tar(work / "shards" / "00001.tar", [])
    run_tokenize(tokenize_recipe(work))
    assert "\n1 tasks had a shard without any sample: 00001\n" in capsys.readouterr().out
    print_status(read_status(work / "latents"))
    assert "\n1 tasks had a shard without any sample: 00001\n" in capsys.readouterr().out
    verify_dataset(work / "latents", deep=True)
    assert {key[:5] for _, key in records(work / "latents")} == {"00000", "00002"}


def test_shards_without_any_sample_end_in_one_remedy_that_works(work, capsys):
    for name in ("00000.tar", "00002.tar"):
        (work / "shards" / name).unlink()
    whole = (work / "shards" / "00001.tar").read_bytes()
    write_tar(work / "shards" / "00001.tar", [])
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"^.*latents: no task holds a sample: 0 samples read, .* remove "
        ):
            run_tokenize(tokenize_recipe(work))
    capsys.readouterr()
    print_status(read_status(work / "latents"))
    said = capsys.readouterr().out
    assert (
        "1 of 1 tasks done" in said and "`bitdance data finalize` finishes the dataset, or says why" in said
    )
    (work / "shards" / "00001.tar").write_bytes(whole)
    with pytest.raises(
        DataError, match=r"00001\.tar has changed since\n.* remove these tasks' folders in .*tasks"
    ):
        run_tokenize(tokenize_recipe(work))
    shutil.rmtree(work / "latents" / "tasks" / "00000")
    run_tokenize(tokenize_recipe(work))
    assert len(records(work / "latents")) == 11
