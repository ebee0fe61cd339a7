"""Metadata and image shards on S3: an S3 server of moto's on loopback, in its own process."""

import errno
import json
import os
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import write_shards
from s3_server import SECRET, overloaded_server, s3_environment, s3_server

from data_pipeline.ingest.kept import KeptRows, index_folder
from data_pipeline.ingest.recipe import InputSection, KeepSection
from data_pipeline.ingest.samples import JSON_BYTES, RawSample, Refused
from data_pipeline.ingest.shards import Shard, list_shards, read_shard, shard_identities
from data_pipeline.ingest.storage import (
    StoreUnreachable,
    exists,
    open_stream,
    reaching,
)
from data_pipeline.ingest.versions import has_changed, shard_version
from data_pipeline.metadata import engine
from data_pipeline.metadata.filtering import run_filter
from data_pipeline.metadata.recipe import EngineSection, FilterRecipe, JoinSection
from data_pipeline.store import open_store
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
    check_index_on_s3(f"{bucket}/kept.parquet", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        run_filter(FilterRecipe.model_validate(values | {"sources": [f"{bucket}/none/*.parquet"]}))
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").iterdir())
    output = capsys.readouterr()
    assert SECRET.encode() not in written and SECRET not in output.out + output.err
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET


def check_index_on_s3(address, folder):
    """The index is built once an object, in the user's folder for temporary files."""
    import s3fs

    section = KeepSection(rows=address, by="url")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        index = index_folder(section)
        made = (index / "rows.arrow").stat().st_mtime_ns
        assert list(KeptRows("url", index).rows(["a", "c"])) == ["c"]
        assert index_folder(section) == index and (index / "rows.arrow").stat().st_mtime_ns == made
        table = pq.read_table(folder / "out" / "kept.parquet").slice(0, 1)
        pq.write_table(table, folder / "other.parquet")
        s3fs.S3FileSystem().put(str(folder / "other.parquet"), address)
        assert index_folder(section) != index
        assert list(KeptRows("url", index_folder(section)).rows(["b", "c"])) == ["b"]


KINDS = ["webdataset", "folder", "classes", "class_tars", "jsonl", "parquet"]


@pytest.mark.parametrize("trouble", ["no keys", "wrong keys"])
def test_a_store_that_lets_nobody_in_says_nothing_about_the_data(bucket, tmp_path, monkeypatch, trouble):
    """Neither a traceback nor a failed task: the same command goes on once the keys are right."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    if trouble == "wrong keys":

        def denied(*arguments, **more):
            raise PermissionError("Access Denied")

        for name in ("_find", "_glob", "_exists", "_info", "_open", "_cat_file"):
            if hasattr(s3fs.S3FileSystem, name):
                monkeypatch.setattr(s3fs.S3FileSystem, name, denied)
    section = {kind: InputSection.model_validate({"kind": kind, "path": [f"{bucket}/x"]}) for kind in KINDS}
    tries = [lambda kind=kind: list_shards(section[kind]) for kind in KINDS]
    tries += [
        lambda: list(read_shard(Shard(f"{bucket}/x.parquet", 1), section["parquet"])),
        lambda: list(read_shard(Shard(f"{bucket}/x.tar", 1), section["webdataset"])),
        lambda: list(read_shard(Shard(f"{bucket}/x", 1, 0, 1), section["folder"])),
        lambda: shard_identities(Shard(f"{bucket}/x.tar", 1), section["webdataset"], "uid"),
        lambda: index_folder(KeepSection(rows=f"{bucket}/kept.parquet", by="url")),
    ]
    try:
        for attempt in tries:
            with pytest.raises(StoreUnreachable, match="cannot be reached"):
                attempt()
    finally:  # the clients without keys
        s3fs.S3FileSystem.clear_instance_cache()


def read_stream(path):
    with open_stream(path) as stream:
        stream.read(1)


@pytest.mark.parametrize(
    ("status", "code", "count"), [(503, "SlowDown", 4), (500, "InternalError", 1), (502, "BadGateway", 1)]
)
def test_a_store_that_keeps_failing_is_to_be_tried_again(monkeypatch, status, code, count):
    import s3fs

    monkeypatch.setattr("data_pipeline.ingest.storage.ATTEMPTS", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    tries = [
        lambda: exists("s3://b/x"),
        lambda: read_stream("s3://b/x.tar"),
        lambda: open_store("s3://b/x").read("plan.json"),
        lambda: index_folder(KeepSection(rows="s3://b/kept.parquet", by="url")),
    ]
    with overloaded_server(status, code) as port, s3_environment(port):
        for attempt in tries[:count]:
            with pytest.raises(StoreUnreachable, match=r"cannot be reached \(E[A-Z]+\)") as error:
                attempt()
            assert error.value.exit_code == 75 and "Signature" not in str(error.value)


@pytest.mark.parametrize("step", ["schema", "join", "rows"])
def test_a_store_that_fails_while_filter_reads_lays_nothing_on_its_tables(monkeypatch, tmp_path, step):
    monkeypatch.setattr("data_pipeline.ingest.storage.ATTEMPTS", 1)
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    section = JoinSection(files=["s3://b/x.parquet"], by="uid", columns={"aesthetic": "score"})
    monkeypatch.setattr(engine, "expand", list)
    steps = {
        "schema": lambda connection: engine.group_files(connection, section.files),
        "join": lambda connection: engine._joined(connection, "SELECT 1 AS uid", section, 0),
        "rows": lambda connection: connection.execute("SELECT * FROM read_parquet('s3://b/x.parquet')"),
    }
    with (
        overloaded_server() as port,
        s3_environment(port),
        pytest.raises(StoreUnreachable, match="the object store any more") as error,
        engine.open_engine(EngineSection(), tmp_path / "spill", remote=True) as connection,
    ):
        steps[step](connection)
    assert error.value.exit_code == 75 and "Signature" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("no"), OSError(errno.ENOSPC, "full"), OSError("Couldn't deserialize thrift")],
    ids=["missing", "local disk", "damaged parquet"],
)
def test_what_is_not_the_stores_failure_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, reaching("s3://b/x"):
        raise error
    assert caught.value is error


def test_globs_of_folders_on_s3(bucket, tmp_path):
    import s3fs

    for name in ("a1", "a2", "b1"):
        s3fs.S3FileSystem().pipe_file(f"{bucket}/pics/{name}/1.jpg", b"x")
    section = InputSection(kind="folder", path=[f"{bucket}/pics/a*"])
    assert [shard.path for shard in list_shards(section)] == [f"{bucket}/pics/a1", f"{bucket}/pics/a2"]


def test_a_folder_on_s3_that_is_edited_is_told_or_not_read(bucket):
    import s3fs

    files = s3fs.S3FileSystem()
    for name, data in {"1.jpg": b"x", "1.txt": b"one", "2.jpg": b"y", ".3.jpg": b"z"}.items():
        files.pipe_file(f"{bucket}/edited/{name}", data)
    section = InputSection(kind="folder", path=[f"{bucket}/edited"], samples_per_shard=1)
    first, second = list_shards(section)
    version = shard_version(first, section)
    assert [s.caption for s in read_shard(first, section)] == ["one"]
    files.pipe_file(f"{bucket}/edited/1.txt", b"two")
    with pytest.raises(DataError, match=r"edited/1\.txt changed while it was read"):
        list(read_shard(first, section))
    now, other = list_shards(section)
    assert [s.caption for s in read_shard(now, section)] == ["two"]
    assert has_changed(now, section, version, since=0.0) and now != first and other == second
    assert not has_changed(other, section, shard_version(second, section), since=0.0)


def test_a_manifest_on_s3_is_read_line_by_line(bucket):
    import s3fs

    lines = [json.dumps({"image": "1.jpg", "caption": "ä" * i}) for i in range(3)]
    s3fs.S3FileSystem().pipe_file(f"{bucket}/m/1.jpg", b"x")
    text = "\n".join([*lines[:2], " " * (JSON_BYTES + 1), lines[2]])
    s3fs.S3FileSystem().pipe_file(f"{bucket}/m/m.jsonl", text.encode())
    section = InputSection(kind="jsonl", path=[f"{bucket}/m/m.jsonl"], samples_per_shard=2)
    found = [s for shard in list_shards(section) for s in read_shard(shard, section)]
    assert [s.caption for s in found if isinstance(s, RawSample)] == ["", "ä", "ää"]
    assert [s.key for s in found if isinstance(s, Refused)] == ["m.jsonl:3"]
    for shard in list_shards(section):
        assert not has_changed(shard, section, shard_version(shard, section), since=0.0)


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
