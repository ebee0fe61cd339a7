"""Metadata and image shards on S3: an S3 server of moto's on loopback, in its own process."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import write_shards
from s3_server import SECRET, s3_environment, s3_server

from data_pipeline.ingest.kept import KeptRows
from data_pipeline.ingest.recipe import InputSection, KeepSection
from data_pipeline.ingest.samples import RawSample
from data_pipeline.ingest.shards import list_shards, read_shard
from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import FilterRecipe
from foundation.errors import DataError


@pytest.fixture(scope="module")
def bucket():
    """Address of an empty bucket; the environment leads S3 clients to the server."""
    import s3fs

    with s3_server() as port, s3_environment(port):
        s3fs.S3FileSystem().mkdir("data")
        yield "s3://data"


def test_filter_reads_from_s3_and_says_no_secret(bucket, tmp_path, capsys):
    import s3fs

    pq.write_table(
        pa.table({"url": list("abc"), "width": [1, 9, 9], "height": [9, 9, 9]}), tmp_path / "t.parquet"
    )
    s3fs.S3FileSystem().put(str(tmp_path / "t.parquet"), f"{bucket}/meta/t.parquet")
    values = {
        "sources": [f"{bucket}/meta/*.parquet"],
        "output": str(tmp_path / "out"),
        "rules": [{"rule": "size", "shorter_min": 5}],
    }
    run_filter(FilterRecipe.model_validate(values))
    assert pq.read_table(tmp_path / "out" / "kept.parquet")["url"].to_pylist() == ["b", "c"]
    s3fs.S3FileSystem().put(str(tmp_path / "out" / "kept.parquet"), f"{bucket}/kept.parquet")
    kept = KeptRows(KeepSection(rows=f"{bucket}/kept.parquet", by="url"))
    assert list(kept.rows(["a", "c"])) == ["c"]
    with pytest.raises(DataError, match="no such file"):
        run_filter(FilterRecipe.model_validate(values | {"sources": [f"{bucket}/none/*.parquet"]}))
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir())
    output = capsys.readouterr()
    assert SECRET.encode() not in written and SECRET not in output.out + output.err
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET


def test_image_shards_on_s3_are_those_on_disk(bucket, tmp_path):
    import s3fs

    write_shards(tmp_path / "shards", 2, samples=3)
    s3fs.S3FileSystem().put(str(tmp_path / "shards") + "/", f"{bucket}/shards/", recursive=True)

    def samples(path):
        section = InputSection(path=[path])
        found = [s for shard in list_shards(section) for s in read_shard(shard, section)]
        return [(s.key, s.image, s.caption) for s in found if isinstance(s, RawSample)]

    assert samples(f"{bucket}/shards") == samples(str(tmp_path / "shards"))
    assert len(samples(f"{bucket}/shards/00001.tar")) == 3
