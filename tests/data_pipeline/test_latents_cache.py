"""Copies of a remote dataset: verified, shared by processes, bounded, and sound after a kill."""

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from latent_folder import GRIDS, latent_record, write_latent_folder

import data_pipeline.shard_cache as shard_cache
from data_pipeline.latents import LatentDataset
from data_pipeline.shard_cache import ShardCache
from foundation.errors import DataError, ExitCode, UserError

COUNT = 200


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_folder(tmp_path_factory.mktemp("remote"), {128: COUNT})


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/files/*.mds"))


def taken(cache: Path) -> int:
    """Bytes of all files in the cache, but for the manifest, whose size nobody knows beforehand."""
    files = [path for path in cache.glob("*/files/**/*") if path.is_file()]
    return sum(path.stat().st_size for path in files if not path.name.endswith("manifest.json"))


def beside(remote: Path) -> int:
    """Bytes of the files that are fetched beside the shards."""
    files = json.loads((remote / "manifest.json").read_text())["files"]
    return int(sum(entry["bytes"] for entry in files.values()))


def read_all(remote: str, cache: str, limit: int | None = None, seed: int = 0) -> None:
    dataset = LatentDataset(remote, cache, limit)
    for sample_id in np.random.default_rng(seed).permutation(COUNT).tolist():
        assert dataset.record(128, sample_id) == latent_record(128, sample_id, GRIDS[128])


def test_each_shard_is_fetched_once_and_kept_for_the_next_job(remote: Path, tmp_path: Path) -> None:
    read_all(str(remote), str(tmp_path))
    shards = json.loads((remote / "index.json").read_text())["shards"]
    first = {path: path.stat().st_ino for path in copies(tmp_path)}
    assert len(first) == len(shards) > 5
    read_all(str(remote), str(tmp_path), seed=1)
    assert {path: path.stat().st_ino for path in copies(tmp_path)} == first
    assert not list(tmp_path.rglob("*.partial"))


def test_the_cache_stays_within_its_limit(remote: Path, tmp_path: Path) -> None:
    largest = max(s["raw_data"]["bytes"] for s in json.loads((remote / "index.json").read_text())["shards"])
    limit = 4 * largest + beside(remote)
    read_all(str(remote), str(tmp_path), limit)
    assert len(copies(tmp_path)) >= 2 and taken(tmp_path) <= limit
    least = limit - 2 * largest
    with pytest.raises(DataError, match=f"give at least {least}"):
        LatentDataset(str(remote), str(tmp_path), least - 1)
    read_all(str(remote), str(tmp_path), least)


def test_fetches_at_the_same_time_make_room_for_each_other_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files of 10 bytes, room for two and a half: whoever comes second counts what is under way."""
    (tmp_path / "remote").mkdir()
    for name in "abc":
        (tmp_path / "remote" / f"{name}.mds").write_bytes(name.encode() * 10)
    cache = ShardCache(str(tmp_path / "remote"), tmp_path / "cache" / "x", 25)
    cache.fetch("a.mds", 10)
    move, seen = shard_cache._move_written, list[set[str]]()

    def late(partial: Path, path: Path) -> None:
        if path.name.endswith("b.mds"):
            cache.fetch("c.mds", 10)
            seen.append({copy.name[-5:] for copy in copies(tmp_path / "cache")})
        move(partial, path)

    monkeypatch.setattr(shard_cache, "_move_written", late)
    cache.fetch("b.mds", 10)
    assert seen == [{"c.mds"}] and taken(tmp_path / "cache") == 20


def test_a_copy_that_differs_is_never_used(remote: Path, tmp_path: Path) -> None:
    broken = tmp_path / "remote"
    write_latent_folder(broken, {128: 20})
    dataset = LatentDataset(str(broken), str(tmp_path / "cache"))
    shard = broken / "tasks/00000/128/shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard.00000.mds cannot be read: its sha256 is not"):
        dataset.record(128, 0)
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match="bytes, expected"):
        dataset.record(128, 0)
    assert not copies(tmp_path / "cache")


def test_a_dataset_made_anew_at_the_same_place_does_not_meet_its_old_copies(tmp_path: Path) -> None:
    folder, cache = tmp_path / "latents", tmp_path / "cache"
    write_latent_folder(folder, {128: 10})
    LatentDataset(str(folder), str(cache)).record(128, 0)
    folder.rename(tmp_path / "old")
    write_latent_folder(folder, {128: 10}, grids={128: [(4, 4)]})
    assert LatentDataset(str(folder), str(cache)).record(128, 0) == latent_record(128, 0, [(4, 4)])


def _read_for_ever(remote: str, cache: str, limit: int, seed: int) -> None:
    while True:
        read_all(remote, cache, limit, seed)


def test_killed_readers_leave_nothing_that_hurts_the_next_ones(remote: Path, tmp_path: Path) -> None:
    limit = 4 * max(path.stat().st_size for path in remote.rglob("*.mds")) + beside(remote)
    context = multiprocessing.get_context("fork")
    for attempt in range(4):
        readers = [
            context.Process(target=_read_for_ever, args=(str(remote), str(tmp_path), limit, seed))
            for seed in range(3)
        ]
        for reader in readers:
            reader.start()
        os.sched_yield()
        readers[0].join(0.1 + 0.2 * attempt)
        for reader in readers:
            assert reader.pid is not None and reader.is_alive()
            os.kill(reader.pid, signal.SIGKILL)
            reader.join()
    read_all(str(remote), str(tmp_path), limit)
    assert taken(tmp_path) <= limit and not list(tmp_path.rglob("*.partial"))


def test_a_store_that_fails_for_a_while_is_asked_again(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([ConnectionError("reset"), TimeoutError("slow")])
    real = ShardCache._downloader

    def flaky(self: ShardCache):  # type: ignore[no-untyped-def]
        error = next(failures, None)
        if error is not None:
            raise error
        return real(self)

    monkeypatch.setattr(ShardCache, "_downloader", flaky)
    assert LatentDataset(str(remote), str(tmp_path)).record(128, 3) == latent_record(128, 3, GRIDS[128])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConnectionError("Signature=quoted"), ExitCode.REQUEUE, r"mds cannot be reached \(ConnectionError\)"),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.RECIPE, "No space left on device"),
        (FileNotFoundError("gone"), ExitCode.DATA, "mds cannot be read: there is no such file"),
    ],
    ids=["away", "full disk", "missing"],
)
def test_who_is_to_blame_decides_the_exit_code(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: ExitCode, said: str
) -> None:
    class Failing:
        def download(self, *_: object) -> None:
            raise error

    dataset = LatentDataset(str(remote), str(tmp_path))
    monkeypatch.setattr(ShardCache, "_downloader", lambda self: Failing())
    with pytest.raises(UserError, match=said) as caught:
        dataset.record(128, 0)
    assert caught.value.exit_code == code and "Signature" not in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_copy_that_was_cut_is_fetched_again(remote: Path, tmp_path: Path) -> None:
    """As after a node's crash: renamed, and never written out."""
    LatentDataset(str(remote), str(tmp_path)).record(128, 0)
    for path in (*copies(tmp_path), *tmp_path.glob("*/files/*.npy")):
        path.write_bytes(path.read_bytes()[:9])
    assert LatentDataset(str(remote), str(tmp_path)).record(128, 0) == latent_record(128, 0, GRIDS[128])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an object store in this process, on loopback."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
    yield f"http://{host}:{port}"
    server.stop()


def test_a_dataset_in_an_object_store(remote: Path, tmp_path: Path, s3: str) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="latents")
    for path in sorted(remote.rglob("*")):
        if path.is_file() and path.name != "done.json":
            client.upload_file(str(path), "latents", f"pt/{path.relative_to(remote)}")
    read_all("s3://latents/pt", str(tmp_path / "cache"))
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"s3://latents/nowhere/manifest.json cannot be read") as caught:
        LatentDataset("s3://latents/nowhere", str(tmp_path / "cache"))
    assert time.monotonic() - begin < 20 and "testing-secret" not in str(caught.value)
