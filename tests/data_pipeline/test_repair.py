"""What does not verify is made anew: found by `verify` or `finalize`, noted, told by `status`, done again."""

import itertools
import json
import os
import random
import shutil
import subprocess

import pytest
from photo_shards import picture, tokenize_recipe, tree, write_shards, write_tar, write_tokenizer

from data_pipeline import verify as verify_module
from data_pipeline.finalize import finalize_dataset
from data_pipeline.status import clear_failures, give_up, print_status, read_status
from data_pipeline.tokenize import writer as writer_module
from data_pipeline.tokenize.folder import DatasetFolder
from data_pipeline.tokenize.run import run_tokenize
from data_pipeline.verify import verify_dataset
from foundation.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards of six pictures, one of which cannot be used, tokenized."""
    folder = tmp_path_factory.mktemp("repair")
    write_shards(folder / "shards", 3, bad={7})
    write_tokenizer(folder / "tokenizer")
    run_tokenize(tokenize_recipe(folder))
    return folder


@pytest.fixture
def latents(made, tmp_path):
    """The dataset, to damage; whole again, at the same place, for the next test."""
    shutil.copytree(made / "latents", tmp_path / "kept")
    yield made / "latents"
    shutil.rmtree(made / "latents")
    shutil.move(tmp_path / "kept", made / "latents")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


def test_a_flipped_byte_is_found_and_the_next_run_makes_its_task_anew(made, latents, capsys):
    before = tree(latents)
    shard = latents / "tasks" / "00001" / "32" / "shard.00000.mds"
    flip(shard, shard.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(DataError, match=r"tokenize` with its recipe makes bad tasks anew \(1 problem\)"):
            verify_dataset(latents)
    status = read_status(latents)
    assert (status.done, list(status.damaged)) == (2, [1]) and "another content" in status.damaged[1]
    print_status(status)
    assert "\ntask 00001 is damaged, and `bitdance data tokenize` makes it anew: " in capsys.readouterr().out
    with pytest.raises(DataError, match=r"1 of 3 tasks are not done \(00001\)"):
        finalize_dataset(str(latents))
    run_tokenize(tokenize_recipe(made))
    assert "task 00001 does not verify and is done again" in capsys.readouterr().out
    assert tree(latents) == before
    verify_dataset(latents, deep=True)
    assert not read_status(latents).damaged


@pytest.fixture
def damaged(latents):
    """Task 1 has a bad byte in its list of refused samples, and all its shards."""
    flip(latents / "tasks" / "00001" / "quarantine.jsonl", 0)
    with pytest.raises(DataError, match="1 problem"):
        verify_dataset(latents)
    return latents


@pytest.fixture
def shard(made):
    """The input shard of task 1, to change; whole again for the next test."""
    path = made / "shards" / "00001.tar"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def test_a_damaged_task_of_a_shard_that_was_replaced_is_not_made_of_another(made, damaged, shard):
    before = tree(damaged)
    write_tar(shard, [("a.jpg", picture(999, 64, 64)), ("a.txt", b"another")])
    with pytest.raises(DataError, match=r"done with another content of their shards:\n  task 00001: "):
        run_tokenize(tokenize_recipe(made))
    assert tree(damaged) == before


def test_a_damaged_task_stays_until_a_new_one_is_whole_and_is_not_forgotten_by_retry(made, damaged):
    """The task fails by now: the records are all that is left of its shard."""
    task, whole = tree(damaged / "tasks"), tree(damaged)
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 3 tasks failed"):
            run_tokenize(tokenize_recipe(made, max_bad_fraction=0.1))
        assert tree(damaged / "tasks") == task
        assert clear_failures(damaged) == 1 and list(read_status(damaged).damaged) == [1]
    run_tokenize(tokenize_recipe(made))
    verify_dataset(damaged)
    assert {name for name in whole if tree(damaged).get(name) != whole[name]} == {
        "damaged/00001.json",
        "tasks/00001/quarantine.jsonl",
    }


def test_two_jobs_make_the_same_damaged_task_anew(made, damaged, monkeypatch):
    """Another job takes the bad folder, and commits its own, at the moment that this one means to."""
    set_aside, recipe = DatasetFolder.set_aside, tokenize_recipe(made)

    def late(folder, number):
        monkeypatch.setattr(DatasetFolder, "set_aside", set_aside)
        set_aside(folder, number)
        set_aside(folder, number)
        run_tokenize(recipe)

    monkeypatch.setattr(DatasetFolder, "set_aside", late)
    run_tokenize(recipe)
    verify_dataset(damaged)
    assert sorted(path.name for path in (damaged / "tasks").iterdir()) == ["00000", "00001", "00002"]


def test_a_task_that_is_made_anew_while_verify_looks_at_it_is_not_noted(made, damaged, monkeypatch):
    note = verify_module._note

    def late(*arguments):
        run_tokenize(tokenize_recipe(made))
        return note(*arguments)

    monkeypatch.setattr(verify_module, "_note", late)
    with pytest.raises(DataError, match="1 problem"):
        verify_dataset(damaged)
    status = read_status(damaged)
    assert status.finished and not status.damaged


def test_a_copy_that_was_put_back_is_good_again(made, latents):
    shard = latents / "tasks" / "00000" / "64" / "shard.00000.mds"
    whole = shard.read_bytes()
    flip(shard, 99)
    with pytest.raises(DataError, match="1 problem"):
        verify_dataset(latents)
    shard.write_bytes(whole)
    verify_dataset(latents)
    assert not read_status(latents).damaged


def test_a_damaged_task_whose_input_is_gone_may_be_given_up(made, latents):
    flip(latents / "tasks" / "00002" / "64" / "shard.00000.mds", 77)
    with pytest.raises(DataError):
        verify_dataset(latents)
    give_up(latents, [2])
    finalize_dataset(str(latents))
    verify_dataset(latents)
    status = read_status(latents)
    assert status.finished and list(status.given_up) == [2] and not status.damaged


@pytest.mark.parametrize("name", ["samples.parquet", "done.json", "32/index.json", "quarantine.jsonl"])
def test_any_byte_of_a_tasks_small_files_is_found_by_verify_and_finalize(made, latents, name):
    path = latents / "tasks" / "00001" / name
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), min(len(whole), 12))
    for place in places:
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises(DataError, match=f"tasks/00001/{name}: "):
            verify_dataset(latents)
        shutil.rmtree(latents / "damaged")
    (latents / "manifest.json").unlink()
    for place in places:
        shutil.rmtree(latents / "damaged", ignore_errors=True)
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises(DataError, match=f"tasks/00001/{name}: " if name != "done.json" else "00001"):
            finalize_dataset(str(latents))
    run_tokenize(tokenize_recipe(made))
    verify_dataset(latents, deep=True)


def test_a_file_that_the_disk_does_not_give_is_a_problem_of_its_task(made, latents):
    # The first byte of that file cannot be read: EIO, as of a bad disk.
    tasks, failing = latents / "tasks", "/proc/self/mem"
    before = tree(latents)
    for name in ("00000/quarantine.jsonl", "00001/done.json", "00002/32/shard.00000.mds"):
        (tasks / name).unlink()
        (tasks / name).symlink_to(failing)
    for look in (read_status, lambda folder: run_tokenize(tokenize_recipe(made))):
        with pytest.raises(DataError, match=r"00001/done\.json cannot be read: Input/output error"):
            look(latents)
    (tasks / "00002/64/shard.00000.mds").unlink()
    (tasks / "00002/64/shard.00000.mds").mkdir()
    with pytest.raises(DataError, match=r"anew \(4 problems\)") as error:
        verify_dataset(latents)
    assert str(error.value).count("cannot be read: Input/output error") == 3
    assert "00002/64/shard.00000.mds: cannot be read: Is a directory" in str(error.value)
    assert sorted(read_status(latents).damaged) == [0, 1, 2]
    run_tokenize(tokenize_recipe(made))
    assert tree(latents) == before


@pytest.mark.parametrize("name", ["recipe.json", "plan.json"])
def test_another_recipe_or_plan_than_the_datasets_is_named(latents, name):
    path = latents / name
    values = json.loads(path.read_text())
    if name == "plan.json":
        values["shards"][1]["path"] += "x"
    else:
        values["near_duplicates"] = 0
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=name if name == "recipe.json" else "tasks/00001: another input"):
        verify_dataset(latents)
    path.write_text("[")
    with pytest.raises(DataError, match=name):
        verify_dataset(latents)


def test_a_dataset_of_an_earlier_version_is_refused_and_left_alone(made, latents):
    """Its plan pinned no kept rows, and its markers had no hash of their own."""
    for path, key in [(latents / "plan.json", "kept"), *((p, "sha256") for p in latents.rglob("done.json"))]:
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    before = tree(latents)
    for use in (verify_dataset, read_status, lambda folder: run_tokenize(tokenize_recipe(made))):
        with pytest.raises(DataError, match=r"plan\.json .* was made by an earlier version \('kept'\)"):
            use(latents)
    assert tree(latents) == before


def test_shards_that_were_written_wrongly_do_not_fit_their_headers(made, tmp_path, monkeypatch):
    """Hashed as they were written: their headers alone tell."""
    damages = itertools.cycle(
        [
            lambda shard: shard + bytes(4),
            lambda shard: bytes([shard[0] + 1]) + shard[1:],  # another count
            lambda shard: shard[:8] + shard[4:8] + shard[12:],  # a record of no bytes
            lambda shard: shard[:10],
        ]
    )
    whole = writer_module._RecordWriter.encode_joint_shard
    monkeypatch.setattr(
        writer_module._RecordWriter, "encode_joint_shard", lambda writer: next(damages)(whole(writer))
    )
    recipe = tokenize_recipe(made, output=str(tmp_path / "latents"))
    run_tokenize(recipe)
    with pytest.raises(DataError, match=r"00002/64/shard\.00000\.mds: its header does not fit") as error:
        verify_dataset(recipe.output)
    assert str(error.value).count("its header does not fit its length") == 6


def test_what_may_not_be_written_is_verified_all_the_same(latents, tmp_path):
    """Read-only: the finding is told, and that it could not be noted."""
    shard = latents / "tasks" / "00001" / "32" / "shard.00000.mds"
    mount = tmp_path / "mount"
    mount.mkdir()
    bind = subprocess.run(["mount", "--bind", latents, mount], check=False).returncode == 0
    if not bind and os.geteuid() == 0:
        pytest.skip("root may write everywhere, and nothing can be mounted")
    try:
        flip(shard, shard.stat().st_size // 2)
        if bind:
            subprocess.run(["mount", "-o", "remount,ro,bind", mount], check=True)
        else:
            latents.chmod(0o500)
        with pytest.raises(
            DataError, match=r"could not be noted in the dataset \(.*(Read-only|denied)"
        ) as error:
            verify_dataset(mount if bind else latents)
        assert "tasks/00001/32/shard.00000.mds: has another content" in str(error.value)
        assert "remove the bad tasks' folders" in str(error.value)
        flip(shard, shard.stat().st_size // 2)
        verify_dataset(mount if bind else latents)
    finally:
        if bind:
            subprocess.run(["umount", "--lazy", mount], check=True)
        else:
            latents.chmod(0o700)
