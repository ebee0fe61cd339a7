"""Finishing a dataset: near-duplicates over all tasks and classes, and hashes that cannot be compared."""

import shutil

import pyarrow.parquet as pq
import pytest
from photo_shards import SIZES, picture, tokenize_recipe, write_shards, write_tar, write_tokenizer

from data_pipeline.images import decode_image
from data_pipeline.latents import LatentDataset
from data_pipeline.tokenize.marker import marker_text, parse_marker
from data_pipeline.tokenize.run import Slice, run_tokenize
from foundation.errors import DataError


@pytest.fixture
def work(tmp_path):
    write_shards(tmp_path / "shards", 3)
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def written(latents, resolution):
    """Keys of all records of a class in the order of its shards, as the tasks noted them."""
    tables = [pq.read_table(task / "samples.parquet").to_pylist() for task in sorted(latents.glob("tasks/*"))]
    return [row["key"] for table in tables for row in table if row["resolution"] == resolution]


def test_near_duplicates_over_shards_are_left_out_of_the_index_only(work):
    """Two pictures of shard 0 come again in shard 1, harder compressed: in both classes, and in one alone."""
    members = []
    for key, number, size in (("both", 0, (64, 64)), ("small", 5, (62, 60))):
        again = decode_image(picture(number, *SIZES[number]), 10**6)
        again.resize(size).save(work / "again.jpg", quality=60)
        members += [(f"{key}.jpg", (work / "again.jpg").read_bytes()), (f"{key}.txt", b"the same again")]
        members += [(f"{key}-other.jpg", picture(500 + number, 64, 64)), (f"{key}-other.txt", b"another one")]
    write_tar(work / "shards" / "00001.tar", members)
    run_tokenize(tokenize_recipe(work))
    dataset = LatentDataset(str(work / "latents"))
    sizes = {c.resolution: (c.raw_samples, c.samples) for c in dataset.manifest.classes}
    assert sizes == {32: (16, 14), 64: (13, 12)} and dataset.manifest.near_duplicates == 3
    left_out = {32: {"both", "small"}, 64: {"both"}}
    for resolution, index in dataset.classes.items():
        raw = written(work / "latents", resolution)
        expected = [key for key in raw if key not in left_out[resolution]]
        assert raw[-1] == expected[-1] and len(expected) == len(raw) - len(left_out[resolution])
        # Before and behind each gap, ids find their own records.
        found = [dataset.record(resolution, i) for i in range(index.samples)]
        assert [record.key for record in found] == expected
        assert [record.n_text for record in found] == index.n_text.tolist()


def test_hashes_by_another_definition_are_not_compared(work):
    run_tokenize(tokenize_recipe(work), Slice(0, 1))
    marker = work / "latents" / "tasks" / "00001" / "done.json"
    values = parse_marker(marker.read_bytes())
    marker.write_bytes(marker_text(values | {"perceptual_hash": "of an earlier version"}))
    with pytest.raises(DataError, match=r"1 tasks \(00001\) were done by another version"):
        run_tokenize(tokenize_recipe(work))
    shutil.rmtree(marker.parent)
    run_tokenize(tokenize_recipe(work))
    classes = LatentDataset(str(work / "latents")).manifest.classes
    assert [c.samples for c in classes] == [18, 15]
