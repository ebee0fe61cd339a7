"""Random access to latent records: the same as streaming's own reader, and every broken folder is named."""

import errno
import json
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from latent_folder import GRIDS, latent_record, write_latent_folder

from data_pipeline.latents import LatentDataset
from data_pipeline.records import LatentRecord
from data_pipeline.streaming_import import MDSReader
from foundation.errors import DataError, ExitCode, UserError

SAMPLES = {64: 40, 128: 61}
DROPPED = {128: [0, 7, 8, 33, 60]}
KEPT = [number for number in range(61) if number not in DROPPED[128]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_folder(tmp_path_factory.mktemp("latents"), SAMPLES, tasks=3, dropped=DROPPED)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(finished, tmp_path / "latents"))


def test_every_id_gives_its_record_without_those_left_out(finished: Path) -> None:
    dataset = LatentDataset(str(finished))
    assert {name: index.samples for name, index in dataset.classes.items()} == {64: 40, 128: 56}
    assert dataset.manifest.tokenizer.bits_per_token == 8
    for sample_id, number in enumerate(KEPT):
        assert dataset.record(128, sample_id) == latent_record(128, number, GRIDS[128])
    for number in range(40):
        assert dataset.record(64, number) == latent_record(64, number, GRIDS[64])
    for wrong in (-1, 56):
        with pytest.raises(IndexError, match="class 128 has 56 samples"):
            dataset.record(128, wrong)


def test_the_side_index_agrees_with_the_records(finished: Path) -> None:
    dataset = LatentDataset(str(finished))
    for resolution, index in dataset.classes.items():
        assert index.shard_sizes.sum() == index.samples
        for sample_id in range(index.samples):
            record = dataset.record(resolution, sample_id)
            assert index.n_text[sample_id] == record.n_text
            assert index.grids[index.bucket[sample_id]].tolist() == [record.h, record.w]


def test_records_equal_what_streamings_reader_reads(finished: Path) -> None:
    found, expected = [], []
    dataset = LatentDataset(str(finished))
    for shard in json.loads((finished / "index.json").read_text())["shards"]:
        reader = MDSReader.from_json(str(finished), None, shard)
        expected += [LatentRecord.from_mds(reader.get_item(row)) for row in range(len(reader))]
    found = [dataset.record(64, i) for i in range(40)] + [dataset.record(128, i) for i in range(56)]
    assert found == [
        record for record in expected if record.key not in {f"128-{i:05d}" for i in DROPPED[128]}
    ]


def _keys(dataset: LatentDataset, ids: list[int]) -> list[str]:
    return [dataset.record(128, sample_id).key for sample_id in ids]


def test_threads_and_processes_share_a_dataset_and_datasets_a_process(finished: Path, tmp_path: Path) -> None:
    dataset = LatentDataset(str(finished))
    other = LatentDataset(str(write_latent_folder(tmp_path / "other", {128: 9})))
    expected = [f"128-{number:05d}" for number in KEPT]
    ids = list(range(56))
    with ThreadPoolExecutor(4) as threads:
        assert all(keys == expected for keys in threads.map(_keys, [dataset] * 20, [ids] * 20))
    assert _keys(other, list(range(9))) == [f"128-{number:05d}" for number in range(9)]
    assert _keys(pickle.loads(pickle.dumps(dataset)), ids) == expected  # noqa: S301  (our own bytes)
    with ProcessPoolExecutor(
        2, mp_context=get_context("fork")
    ) as processes:  # open file handles are inherited
        assert all(keys == expected for keys in processes.map(_keys, [dataset] * 4, [ids] * 4))


def test_reading_leaves_no_shared_memory(finished: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    _keys(LatentDataset(str(finished)), [0, 55, 10])
    assert {
        path.name for path in set(Path("/dev/shm").iterdir()) - before if path.name[:6].isdigit()
    } == set()


def _change_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1].update(changes)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_system_that_fails_is_not_the_datas_fault(
    finished: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_: int) -> bytes:
        raise OSError(number, os.strerror(number))

    dataset = LatentDataset(str(finished))
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UserError, match=r"mds: .*the same command goes on once it can be read") as caught:
        dataset.record(min(GRIDS), 0)
    assert caught.value.exit_code == ExitCode.REQUEUE


def test_an_unfinished_folder_says_how_to_finish_it(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="bitdance data finalize"):
        LatentDataset(str(folder))
    with pytest.raises(DataError, match="there is no such folder; run `bitdance data tokenize RECIPE`"):
        LatentDataset(str(folder / "elsewhere"))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"No such file.*; run `bitdance data tokenize RECIPE`, whose output"):
        LatentDataset(str(folder / "empty"))


def test_a_pickle_column_is_refused(folder: Path) -> None:
    encodings = ["pkl", "str", "uint16", "str", "uint16", "str", "uint16"]
    _change_index(folder, column_encodings=encodings)
    with pytest.raises(DataError, match="is not an uncompressed MDS shard with the columns"):
        LatentDataset(str(folder))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
def test_a_shard_outside_of_the_dataset_is_refused(folder: Path, name: str) -> None:
    _change_index(folder, raw_data={"basename": name, "bytes": 10, "hashes": {}})
    with pytest.raises(DataError, match="lies outside of the dataset"):
        LatentDataset(str(folder))


def test_an_index_that_contradicts_the_manifest_is_refused(folder: Path) -> None:
    _change_index(folder, samples=1)
    with pytest.raises(DataError, match="the manifest says 40"):
        LatentDataset(str(folder))
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="is not an index of latent shards"):
        LatentDataset(str(folder))


@pytest.mark.parametrize("name", ["n_text.npy", "bucket.npy", "shard_sizes.npy"])
def test_a_broken_side_index_is_named(folder: Path, name: str) -> None:
    path = folder / "side-test" / "128" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"128/{name}"):
        LatentDataset(str(folder))


def test_a_shard_that_is_cut_short_or_garbled_is_named(folder: Path) -> None:
    dataset = LatentDataset(str(folder))
    shards = json.loads((folder / "index.json").read_text())["shards"]
    cut = folder / shards[0]["raw_data"]["basename"]
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"tasks/00000/64/shard.00000.mds: record \d+ .*bitdance data verify"):
        dataset.record(64, shards[0]["samples"] - 1)
    garbled = folder / shards[-1]["raw_data"]["basename"]
    garbled.write_bytes(garbled.read_bytes()[:16] + b"\xff" * (garbled.stat().st_size - 16))
    with pytest.raises(DataError, match="cannot be read"):
        dataset.record(128, 55)
    (folder / shards[1]["raw_data"]["basename"]).unlink()
    with pytest.raises(DataError, match="No such file"):
        dataset.record(64, shards[0]["samples"])
