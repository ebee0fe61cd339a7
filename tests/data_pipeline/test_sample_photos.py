"""The example photographs: as img2dataset and LAION would leave them, the same bytes each time."""

import io
import json
import sys
import tarfile

import pyarrow.parquet as pq
import pytest
from photo_shards import tree
from PIL import Image
from plain_laion_hash import plain_laion_hash

from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import FilterRecipe
from data_pipeline.sample_photos.catalogue import PHOTOS, REJECTS
from data_pipeline.sample_photos.write import write_sample
from foundation.errors import UserError
from foundation.ownership import FolderTaken
from foundation.recipes import load_recipe


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("example") / "photos"
    write_sample(folder)
    return folder


def test_shards_are_what_img2dataset_leaves(example):
    keys = []
    for shard in ("00000", "00001"):
        rows = {row["key"]: row for row in pq.read_table(example / "shards" / f"{shard}.parquet").to_pylist()}
        stats = json.loads((example / "shards" / f"{shard}_stats.json").read_text())
        with tarfile.open(example / "shards" / f"{shard}.tar") as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        successes = [key for key, row in rows.items() if row["status"] == "success"]
        assert sorted(files) == sorted(f"{key}.{e}" for key in successes for e in ("jpg", "json", "txt"))
        assert stats["count"] == len(rows) and stats["successes"] == len(successes)
        for key in successes:
            body = json.loads(files[f"{key}.json"])
            assert body == rows[key]
            assert files[f"{key}.txt"].decode() == body["caption"]
            assert body["hash"] == plain_laion_hash(body["url"], body["caption"])
            assert Image.open(io.BytesIO(files[f"{key}.jpg"])).size == (body["width"], body["height"])
        keys += successes
    assert len(set(keys)) == len(keys) == len(PHOTOS) + len(REJECTS)


def test_at_least_fourteen_photographs_with_captions_of_their_own(example):
    captions = [photo.caption for photo in PHOTOS]
    assert len(set(captions)) == len(captions) >= 14


def test_the_quickstarts_filter_keeps_exactly_the_photographs(example, tmp_path):
    overrides = [f"sources=[{example}/metadata.parquet]", f"output={tmp_path}/kept"]
    funnel = run_filter(load_recipe(FilterRecipe, "configs/quickstart/filter.yaml", overrides))
    kept = pq.read_table(tmp_path / "kept" / "kept.parquet")["caption"].to_pylist()
    assert sorted(kept) == sorted(photo.caption for photo in PHOTOS)
    assert funnel.rows == len(PHOTOS) + len(REJECTS) + 1


def test_the_same_bytes_each_time_and_nothing_the_second_time(example, tmp_path):
    write_sample(tmp_path / "again")
    assert tree(tmp_path / "again") == tree(example)
    stamps = {p: p.stat().st_mtime_ns for p in example.rglob("*")}
    write_sample(example)
    assert {p: p.stat().st_mtime_ns for p in example.rglob("*")} == stamps


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FolderTaken, match="not empty"):
        write_sample(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_scikit_image_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r"bitdance-trainer\[demo\]"):
        write_sample(tmp_path / "x")
    assert not (tmp_path / "x").exists()
