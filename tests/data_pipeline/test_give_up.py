"""A shard that stays bad is no dead end: mended, allowed, or given up."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from photo_shards import picture, tokenize_recipe, write_shards, write_tar, write_tokenizer
from typer.testing import CliRunner

from data_pipeline.cli import app
from data_pipeline.ingest.shards import Shard
from data_pipeline.latents import LatentDataset
from data_pipeline.manifest import TextTokenizerManifest, TokenizerManifest, parse_manifest
from data_pipeline.status import clear_failures, print_status, read_status
from data_pipeline.store import PlaceUnusable
from data_pipeline.tokenize.folder import DatasetFolder, Plan
from data_pipeline.tokenize.run import run_tokenize
from data_pipeline.verify import verify_dataset
from foundation.errors import DataError, RecipeError


@pytest.fixture
def begun(tmp_path):
    """A job of three shards: the second is cut short, the third holds too many bad samples."""
    write_shards(tmp_path / "shards", 3, bad=range(13, 16))
    tar = tmp_path / "shards" / "00001.tar"
    whole = tar.read_bytes()
    write_tokenizer(tmp_path / "tokenizer")
    from models.text_tokens import train_text_tokenizer

    train_text_tokenizer(["a picture of number in a frame"] * 3, 280).save_pretrained(tmp_path / "text")
    tar.write_bytes(whole[: len(whole) // 2])
    recipe = tokenize_recipe(tmp_path, text_tokenizer={"name": str(tmp_path / "text")})
    with pytest.raises(DataError, match="2 of 3 tasks failed"):
        run_tokenize(recipe)
    return recipe


def test_a_given_up_shard_may_go_and_more_bad_samples_may_be_allowed(begun, tmp_path, capsys):
    (tmp_path / "shards" / "00001.tar").unlink()
    with pytest.raises(RecipeError, match=r"0 are new and 1 gone \(such as .*00001\.tar.* --give-up 1`"):
        run_tokenize(begun)
    with pytest.raises(DataError, match=r"1 of 3 tasks failed(.|\n)*max_bad_fraction = 0\.2"):
        assert CliRunner().invoke(app, ["retry", begun.output, "--give-up", "1"]).exit_code == 0
        run_tokenize(begun)
    assert clear_failures(begun.output) == 1
    run_tokenize(begun.model_copy(update={"max_bad_fraction": 0.5}))

    manifest = parse_manifest((Path(begun.output) / "manifest.json").read_text(), "manifest.json")
    assert (manifest.tasks, manifest.given_up, manifest.quarantined) == (3, [1], 3)
    status = read_status(begun.output)
    assert status.finished and status.done == 2 and not status.failed
    assert "damaged or cut short" in status.given_up[1]
    print_status(status)
    assert "0 failed, 1 given up" in capsys.readouterr().out
    verify_dataset(begun.output, deep=True)
    read = LatentDataset(begun.output)
    assert len(read.manifest.classes) == 2 and all(c.samples for c in read.manifest.classes)
    # As if the shard had never been in the input, but for the numbers of the tasks.
    other = tokenize_recipe(tmp_path, text_tokenizer=begun.text_tokenizer.model_dump())
    other = other.model_copy(update={"output": str(tmp_path / "other"), "max_bad_fraction": 0.5})
    run_tokenize(other)
    alone = parse_manifest((tmp_path / "other" / "manifest.json").read_text(), "manifest.json")
    assert alone.tasks == 2 and '"given_up"' not in (tmp_path / "other" / "manifest.json").read_text()
    assert [c.samples for c in alone.classes] == [c.samples for c in manifest.classes]


def test_retry_on_a_full_disk_is_said_and_goes_on_when_there_is_room(tmp_path):
    """With each page more of free room it comes further; to forget failures takes none."""
    disk, latents = tmp_path / "disk", tmp_path / "disk" / "latents"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        folder, shards = DatasetFolder(latents), (Shard("a.tar", 5), Shard("b.tar", 6))
        tokenizer = TokenizerManifest(
            fingerprint="f", downsample=16, bits_per_token=16, dtype="float32", folder="t"
        )
        text = TextTokenizerManifest(name="n", inside=False, vocab_size=9, sha256="s")
        folder.write_plan(Plan(shards, tokenizer, text, None))
        for number, shard in enumerate(shards):
            folder.fail(number, shard, "damaged")
        errors = list[PlaceUnusable]()
        for pages in range(20):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            (disk / "ballast").write_bytes(bytes(free - pages * 4096))
            result = CliRunner().invoke(app, ["retry", str(latents), "--give-up", "0", "--give-up", "1"])
            (disk / "ballast").unlink()
            assert not [path for path in latents.rglob(".*") if path.is_file()]
            assert folder.failures().keys() | folder.given_up().keys() == {0, 1}  # each is one of both, whole
            if result.exit_code == 0:
                break
            assert isinstance(result.exception, PlaceUnusable)
            errors.append(result.exception)
        assert errors and all(
            re.fullmatch(r"[^\n]*latents[^\n]*No space left[^\n]*", str(error)) for error in errors
        )
        assert folder.given_up()[1]["reason"] == "damaged" and not folder.failures()
        folder.fail(0, shards[0], "damaged")
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))
        assert clear_failures(latents) == 1
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_failed_task_lists_its_bad_samples(begun):
    note = json.loads((Path(begun.output) / "failed" / "00002.json").read_text())
    assert [line["key"] for line in note["refused"]] == ["000020001", "000020002", "000020003"]
    assert note["refused_in_all"] == 3 and "not a picture" in note["refused"][0]["reason"]


def test_a_mended_shard_is_done_and_what_is_done_is_not_given_up(begun, tmp_path):
    members = [("a.jpg", picture(50, 64, 64)), ("a.txt", b"mended")]
    for name in ("00001.tar", "00002.tar"):
        write_tar(tmp_path / "shards" / name, members)
    run_tokenize(begun)
    assert read_status(begun.output).finished
    result = CliRunner().invoke(app, ["retry", begun.output, "--give-up", "1", "--give-up", "9"])
    assert isinstance(result.exception, RecipeError)
    assert "task 00001: is done" in str(result.exception) and "no such task" in str(result.exception)
