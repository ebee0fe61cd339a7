"""The lookup of kept rows by key against a plain dict, and its index, which many may want at once."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import write_shards

from data_pipeline.ingest import key_index, made_once
from data_pipeline.ingest.kept import KeptRows, index_folder, kept_captions
from data_pipeline.ingest.key_index import build_index, table_version
from data_pipeline.ingest.made_once import make_once
from data_pipeline.ingest.recipe import InputSection, KeepSection
from data_pipeline.ingest.storage import file_version
from data_pipeline.metadata.schema import SCORES
from foundation.errors import DataError
from trainer.tokenizer_training.pictures import _samples


def write_kept(path, by, keys, row_group_size=None):
    """A table like the filter's; row i has the caption `c<i>` and the aesthetic score i."""
    kind = pa.int64() if by == "hash" else pa.string()
    table = {by: pa.array(keys, kind), "caption": [None if i % 7 == 3 else f"c{i}" for i in range(len(keys))]}
    table |= {name: pa.array([None] * len(keys), pa.float64()) for name in SCORES}
    table["aesthetic"] = pa.array([float(i) for i in range(len(keys))])
    pq.write_table(pa.table(table), path, row_group_size=row_group_size)


def plain_join(keys, wanted):
    """Every wanted key's last row."""
    last = {key: i for i, key in enumerate(keys) if key is not None}
    return {
        key: {"caption": None if i % 7 == 3 else f"c{i}", "scores": {"aesthetic": float(i)}}
        for key, i in last.items()
        if key in wanted
    }


def lookup(path, by, wanted):
    return KeptRows(by, index_folder(KeepSection(rows=str(path), by=by))).rows(wanted)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(key_index, "BATCH_ROWS", 2048)


@pytest.mark.parametrize("by", ["hash", "url"])
@pytest.mark.parametrize("hash_bits", [64, 3, 0])
@pytest.mark.parametrize("seed", [0, 1])
def test_lookup_is_a_plain_join(tmp_path, monkeypatch, small_batches, by, hash_bits, seed):
    """With keys that come often, keys that are missing on either side, nulls, and hashes that collide."""
    mask = (1 << hash_bits) - 1
    whole, sql = key_index.key_hashes, key_index.HASH_SQL
    monkeypatch.setattr(key_index, "HASH_SQL", f"({sql} & {mask}::UBIGINT)")
    monkeypatch.setattr(key_index, "key_hashes", lambda keys: whole(keys) & np.uint64(mask))
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-3000, 3000, 5000).tolist()
    name = (lambda n: n * 2**50) if by == "hash" else (lambda n: f"https://ä.example/{n}")
    keys = [None if n % 50 == 0 else name(n) for n in numbers]
    # Row groups of odd sizes, so that what DuckDB hands out is not cut evenly.
    write_kept(tmp_path / "kept.parquet", by, keys, row_group_size=777)
    for count in (0, 1, 40, 3000):
        wanted = [name(int(n)) for n in rng.integers(-4000, 4000, count)] + [None]
        assert lookup(tmp_path / "kept.parquet", by, wanted) == plain_join(keys, set(wanted))
    assert list(kept_captions(KeepSection(rows=str(tmp_path / "kept.parquet"), by=by))) == [
        f"c{i}" for i in range(5000) if i % 7 != 3
    ]


@pytest.mark.parametrize("keys", [[], [None, None]])
def test_tables_without_keys_join_nothing(tmp_path, keys):
    write_kept(tmp_path / "kept.parquet", "uid", keys)
    assert lookup(tmp_path / "kept.parquet", "uid", ["a"]) == {}


def test_the_index_is_built_once_and_anew_for_another_table(tmp_path, monkeypatch):
    path, built = tmp_path / "kept.parquet", []
    monkeypatch.setattr(
        "data_pipeline.ingest.kept.build_index", lambda *a: (built.append(a), build_index(*a))
    )
    write_kept(path, "uid", ["a", "b"])
    os.utime(path, (1, 1))
    assert lookup(path, "uid", ["b"]) == lookup(path, "uid", ["b"]) == plain_join("ab", "b")
    assert len(built) == 1
    write_kept(path, "uid", ["b", "a"])  # as large
    os.utime(path, (2, 2))
    assert lookup(path, "uid", ["b"]) == plain_join("ba", "b")
    assert len(built) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_index_of_replaced_rows_goes_once_nobody_has_used_it_for_a_day(tmp_path):
    path, folders = tmp_path / "kept.parquet", []
    for moment, keys in enumerate(["ab", "bc", "cd"]):
        write_kept(path, "uid", list(keys))
        os.utime(path, (moment, moment))
        folders.append(index_folder(KeepSection(rows=str(path), by="uid")))
    assert all(folder.is_dir() for folder in folders)  # made a moment ago
    mine = tmp_path / "kept-by-hand"
    mine.mkdir()
    users = [KeptRows("uid", folder) for folder in folders]
    for folder in (*folders, mine):
        os.utime(folder, (time.time() - 86_460,) * 2)
    users[1].rows(["b"])  # which says that it is in use
    assert index_folder(KeepSection(rows=str(path), by="uid")) == folders[2]
    assert sorted(p for p in tmp_path.iterdir() if p != path) == sorted([mine, *folders[1:]])
    assert users[0].rows(["b"]) == plain_join("ab", "b")  # open files outlive their names


def test_rows_in_a_folder_that_cannot_be_written_are_indexed_elsewhere(tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    rows.mkdir()
    write_kept(rows / "kept.parquet", "uid", ["a", "b"])
    monkeypatch.setattr(os, "access", lambda *a, **more: False)  # root may write everywhere
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    section = KeepSection(rows=str(rows / "kept.parquet"), by="uid")
    folder = index_folder(section)
    assert KeptRows("uid", folder).rows(["b"]) == plain_join("ab", "b")
    assert [p.name for p in rows.iterdir()] == ["kept.parquet"]
    assert folder.parent == tmp_path / f"bitdance-kept-{os.getuid()}"
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    other = folder.with_name("other-by-url-0123456789ab")
    other.mkdir()
    for old in (folder, other):
        os.utime(old, (time.time() - 86_460,) * 2)
    before = (folder / "rows.arrow").stat().st_mtime_ns
    assert index_folder(section) == folder and (folder / "rows.arrow").stat().st_mtime_ns == before
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_not_the_filters_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "kept.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(
        DataError, match=r"cannot be read as the filter's kept rows .*data filter` makes it anew"
    ):
        lookup(path, "uid", [])
    pq.write_table(pa.table({"uid": ["a"], "caption": ["c"]}), path)
    with pytest.raises(DataError, match=r"lacks the columns .*aesthetic.*give the kept.parquet"):
        lookup(path, "uid", [])
    write_kept(path, "uid", [hashlib.md5(b"%d" % i).hexdigest() for i in range(20_000)])
    data = bytearray(path.read_bytes())
    data[100:50_000] = bytes(49_900)
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=r"cannot go on: .*kept\.parquet(?!.*memory).* Remove its folder, and"
    ):
        lookup(path, "uid", [])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.parquet"]


def test_the_tokenizers_training_reads_kept_samples_only(tmp_path):
    write_shards(tmp_path / "shards", 2, samples=3)
    write_kept(tmp_path / "kept.parquet", "hash", [5, 1, 99])
    section = InputSection(path=[str(tmp_path / "shards")])
    keep = KeepSection(rows=str(tmp_path / "kept.parquet"), by="hash")
    found = _samples(SimpleNamespace(input=section, keep=keep))
    assert [sample.fields["hash"] for sample in found] == [1, 5]


def make_slowly(final, counter):
    def make(folder):
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.3)
        (folder / "whole").write_text("yes")

    make_once(Path(final), make)
    assert (Path(final) / "whole").read_text() == "yes"


def test_many_processes_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    processes = [context.Process(target=make_slowly, args=(tmp_path / "made", counter)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert counter.value == 1
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_killed_maker_is_followed_by_another(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; "
        "from data_pipeline.ingest.made_once import make_once; "
        "make_once(Path(sys.argv[1]), lambda folder: os.kill(os.getpid(), signal.SIGKILL))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "made")], check=False)
    assert done.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # what was being made, and its claim
    make_once(tmp_path / "made", lambda folder: (folder / "whole").touch())
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_silent_maker_of_another_host_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(made_once, "POLL_SECONDS", 0.02)
    other = tmp_path / ".made.elsewhere.1.00000000.partial"
    other.mkdir()
    (tmp_path / ".made.claim").symlink_to(other.name)
    thread = threading.Thread(target=make_once, args=(tmp_path / "made", lambda folder: None))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive() and not (tmp_path / "made").exists()
    os.utime(other, (time.time() - 601,) * 2)
    thread.join(10)
    assert (tmp_path / "made").is_dir() and other.is_dir()


def test_versions_tell_tables_apart(tmp_path):
    write_kept(tmp_path / "a.parquet", "uid", ["a"])
    write_kept(tmp_path / "b.parquet", "uid", ["b"])
    for name in "ab":
        os.utime(tmp_path / f"{name}.parquet", (1, 1))
    assert table_version(tmp_path / "a.parquet") != table_version(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="does not exist"):
        table_version(tmp_path / "c.parquet")


def test_a_table_that_was_copied_or_touched_is_the_same(tmp_path):
    write_kept(tmp_path / "a.parquet", "uid", ["a"])
    version = table_version(tmp_path / "a.parquet")
    (tmp_path / "copy.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    os.utime(tmp_path / "a.parquet", (1, 1))
    assert table_version(tmp_path / "copy.parquet") == table_version(tmp_path / "a.parquet") == version


@pytest.mark.parametrize("size", [1, 70_000, 1 << 20, 5 << 20])
def test_a_files_version_is_of_its_content(tmp_path, size):
    path, data = tmp_path / "file", bytearray(np.random.default_rng(0).bytes(size))
    path.write_bytes(data)
    version = file_version(str(path))
    # Whole up to 1 MiB; beyond, its ends.
    for place in {0, size // 3, size // 2, size - 1} if size <= 1 << 20 else {0, size - 1}:
        changed = data.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert file_version(str(path)) != version
    path.write_bytes(data)
    os.utime(path, (1, 1))
    assert file_version(str(path)) == version
