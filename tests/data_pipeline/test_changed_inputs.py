"""Whatever kind of shard is edited, and where: what is done of it is told and stays, and nothing is mixed."""

import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_shards import picture, tokenize_recipe, tree, write_tar, write_tokenizer

from data_pipeline.ingest import loose_files
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.shards import list_shards, read_shard
from data_pipeline.ingest.versions import has_changed, shard_version
from data_pipeline.tokenize import task as task_module
from data_pipeline.tokenize.run import Slice, run_tokenize
from foundation.errors import DataError, RecipeError
from models.text_tokens import train_text_tokenizer

PHOTOS = [picture(seed, 32, 32) for seed in range(4)]


def tar_of(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_folder(root):
    for i, photo in enumerate(PHOTOS):
        (root / f"{i}.jpg").write_bytes(photo)
        if i != 3:
            (root / f"{i}.txt").write_text(f"caption {i}")
    return {"path": [str(root)], "samples_per_shard": 2}


def write_classes(root):
    for i, photo in enumerate(PHOTOS):
        (root / "pictures" / f"class_{i}").mkdir(parents=True)
        (root / "pictures" / f"class_{i}" / "a.jpg").write_bytes(photo)
    (root / "names.json").write_text(json.dumps({f"class_{i}": f"name {i}" for i in range(4)}))
    captions = str(root / "names.json")
    return {"path": [str(root / "pictures")], "samples_per_shard": 2, "captions": captions}


def write_manifest(root):
    lines = [json.dumps({"image": f"{i}.jpg", "caption": f"caption {i}"}) + "\n" for i in range(4)]
    for i, photo in enumerate(PHOTOS):
        (root / f"{i}.jpg").write_bytes(photo)
    (root / "m.jsonl").write_text("".join(lines))
    return {"path": [str(root / "m.jsonl")], "samples_per_shard": 2}


def write_class_tars(root):
    inner = [tar_of(*((f"{i}.jpg", PHOTOS[i]) for i in numbers)) for numbers in ((0, 1), (2, 3))]
    write_tar(root / "train.tar", [("n0.tar", inner[0]), ("n1.tar", inner[1])])
    (root / "names.json").write_text(json.dumps({"n0": "name 0", "n1": "name 1"}))
    return {"path": [str(root / "train.tar")], "captions": str(root / "names.json")}


def write_tars(root):
    for number in range(2):
        members = [(f"{i}.jpg", PHOTOS[i]) for i in (2 * number, 2 * number + 1)]
        members += [(name.replace("jpg", "txt"), b"a caption") for name, _ in members]
        write_tar(root / f"{number}.tar", sorted(members))
    return {"path": [str(root)]}


def write_tables(root):
    for number in range(2):
        rows = [{"image": {"bytes": PHOTOS[2 * number + i]}, "text": "a caption"} for i in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{number}.parquet")
    return {"path": [str(root)]}


WRITERS = {
    "folder": write_folder,
    "classes": write_classes,
    "jsonl": write_manifest,
    "class_tars": write_class_tars,
    "webdataset": write_tars,
    "parquet": write_tables,
}


def flip(path, where=-1):
    """Another content of the same size, under an old time, as a copy that keeps times has."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))


# kind, what is edited and how, and the label of the one shard that has changed by it.
EDITS = {
    "caption of the same length": ("folder", lambda r: flip(r / "2.txt"), "[2:4]"),
    "longer caption": ("folder", lambda r: (r / "0.txt").write_text("longer than before"), "[0:2]"),
    "caption removed": ("folder", lambda r: (r / "1.txt").unlink(), "[0:2]"),
    "caption added": ("folder", lambda r: (r / "3.txt").write_text("new"), "[2:4]"),
    "another kind of caption": ("folder", lambda r: (r / "0.txt").rename(r / "0.text"), "[0:2]"),
    "picture of the same size": ("folder", lambda r: flip(r / "2.jpg"), "[2:4]"),
    "longer picture": ("folder", lambda r: (r / "2.jpg").write_bytes(PHOTOS[2] + b"x"), "[2:4]"),
    "picture renamed": ("folder", lambda r: (r / "1.jpg").rename(r / "1.jpeg"), "[0:2]"),
    "picture of a class": ("classes", lambda r: flip(r / "pictures" / "class_1" / "a.jpg"), "[0:2]"),
    "line of the same length": ("jsonl", lambda r: flip(r / "m.jsonl", -4), "[2:4]"),
    "picture of a manifest": ("jsonl", lambda r: flip(r / "1.jpg"), "[0:2]"),
    "picture of a manifest removed": ("jsonl", lambda r: (r / "1.jpg").unlink(), "[0:2]"),
    "first tar in a tar": ("class_tars", lambda r: flip(r / "train.tar", 512 + 100), "[n0.tar]"),
    "last tar in a tar": ("class_tars", lambda r: flip(r / "train.tar", 512 + 10240 + 700), "[n1.tar]"),
    "tar": ("webdataset", lambda r: flip(r / "1.tar", 600), "1.tar"),
    "table": ("parquet", lambda r: flip(r / "0.parquet", 100), "0.parquet"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(folder / "tokenizer")
    train_text_tokenizer(["a caption name class 1 2 3"] * 3, 270).save_pretrained(str(folder / "text"))
    return folder


def recipe_for(tokenizers, root, kind):
    (root / "input").mkdir()
    return tokenize_recipe(
        root,
        input={"kind": kind} | WRITERS[kind](root / "input"),
        tokenizer=str(tokenizers / "tokenizer"),
        text_tokenizer={"name": str(tokenizers / "text")},
        classes=[{"resolution": 32, "buckets": [[32, 32]]}],
        captions={"missing": "keep"},
        near_duplicates=None,
        max_bad_fraction=0.9,
    )


@pytest.fixture(scope="module")
def done(tokenizers, tmp_path_factory):
    """Kind -> folder and recipe of a dataset that is finished."""
    made = {}

    def one(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind), None
            made[kind] = made[kind][0], recipe_for(tokenizers, made[kind][0], kind)
            run_tokenize(made[kind][1])
        return made[kind]

    return one


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_back(folder, before):
    for path in contents(folder).keys() - before.keys():
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


@pytest.mark.parametrize("name", EDITS)
def test_what_is_done_of_an_edited_shard_is_told_and_stays(done, name, capsys):
    kind, edit, label = EDITS[name]
    folder, recipe = done(kind)
    inputs, latents = contents(folder / "input"), tree(folder / "latents")
    edit(folder / "input")
    with pytest.raises(DataError) as error:
        run_tokenize(recipe)
    told = [line for line in str(error.value).splitlines() if "has changed since" in line]
    assert len(told) == 1 and told[0].endswith(f"{label} has changed since")
    assert tree(folder / "latents") == latents
    put_back(folder / "input", inputs)  # a copy, with other times
    run_tokenize(recipe)
    assert "all 2 tasks were done already" in capsys.readouterr().out
    assert tree(folder / "latents") == latents


NAMES = st.sampled_from([f"{i}.{e}" for i in range(5) for e in ("jpg", "txt", "png", "text")] + [".1.jpg"])
FILES = st.dictionaries(NAMES, st.sampled_from([b"a", b"b", b"long"]), max_size=14)
KIND = st.sampled_from(["folder", "jsonl"])


def lay_out(root, files, kind):
    for path in root.iterdir():
        if path.read_bytes() != files.get(path.name):
            path.unlink()
    for name, data in files.items():
        if not (root / name).exists():
            (root / name).write_bytes(data)
            os.utime(root / name, (1e9, 1e9))
    section = InputSection(kind=kind, path=[str(root)], samples_per_shard=2)
    if kind == "jsonl":  # with each text as a line
        lines = [json.dumps({"image": name, "caption": str(data)}) for name, data in sorted(files.items())]
        (root / "m.jsonl").write_text("\n".join(lines))
    try:
        return section, {shard.label: shard for shard in list_shards(section)}
    except DataError:  # none at all
        return section, {}


@settings(max_examples=60, deadline=None)
@given(before=FILES, after=FILES, kind=KIND, keep=st.sets(NAMES))
def test_no_edit_of_loose_files_that_changes_a_sample_goes_unseen(before, after, kind, keep):
    """The plain definition: read both times, and compare."""
    after = after | {name: data for name, data in before.items() if name in keep}
    with tempfile.TemporaryDirectory() as place:
        section, shards = lay_out(Path(place), before, kind)
        then = {name: (list(read_shard(s, section)), shard_version(s, section)) for name, s in shards.items()}
        for name, shard in lay_out(Path(place), before, kind)[1].items():
            assert not has_changed(shard, section, then[name][1], since=0.0)
        written = time.time() - 0.1  # what is older is not opened
        for name, shard in lay_out(Path(place), after, kind)[1].items():
            samples, version = then.get(name, ([], ""))
            if list(read_shard(shard, section)) != samples:
                assert has_changed(shard, section, version, since=written)


@pytest.mark.parametrize(
    "name",
    [
        "caption of the same length",
        "caption removed",
        "picture of the same size",
        "picture of a class",
        "line of the same length",
        "picture of a manifest",
        "picture of a manifest removed",
        "last tar in a tar",
        "table",
    ],
)
def test_a_shard_that_is_edited_while_it_is_read_fails_its_task_alone(
    tokenizers, tmp_path, monkeypatch, name
):
    kind, edit, label = EDITS[name]
    recipe = recipe_for(tokenizers, tmp_path, kind)
    marker = task_module._Task._marker

    def late(task):
        if task.shard.label.endswith(label):
            edit(tmp_path / "input")
        return marker(task)

    monkeypatch.setattr(task_module._Task, "_marker", late)
    with pytest.raises(DataError) as error:
        run_tokenize(recipe)
    told = [line for line in str(error.value).splitlines() if line.startswith("  task")]
    assert len(told) == 1 and f"{label} changed while it was read" in told[0]
    assert len(list((tmp_path / "latents" / "tasks").iterdir())) == 1


@pytest.mark.parametrize("kind", ["classes", "class_tars"])
def test_class_captions_that_were_replaced_are_refused(done, tokenizers, tmp_path, monkeypatch, kind):
    folder, recipe = done(kind)
    names, latents = folder / "input" / "names.json", tree(folder / "latents")
    before = names.read_bytes()
    flip(names, -4)
    with pytest.raises(RecipeError, match=r"class captions .*names\.json were replaced since .*latents was"):
        run_tokenize(recipe)
    names.write_bytes(before)
    run_tokenize(recipe)
    assert tree(folder / "latents") == latents

    recipe = recipe_for(tokenizers, tmp_path, kind)
    marker = task_module._Task._marker

    def late(task):
        flip(tmp_path / "input" / "names.json", -4)
        return marker(task)

    monkeypatch.setattr(task_module._Task, "_marker", late)
    with pytest.raises(DataError, match=r"names\.json changed while it was read"):
        run_tokenize(recipe, Slice(0, 2))
    assert not list((tmp_path / "latents" / "tasks").glob("*"))


@pytest.mark.parametrize("kind", ["classes", "class_tars"])
def test_a_plan_of_before_class_captions_were_pinned_pins_those_that_are_there(tokenizers, tmp_path, kind):
    recipe = recipe_for(tokenizers, tmp_path, kind)
    run_tokenize(recipe, Slice(0, 2))
    path = tmp_path / "latents" / "plan.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in plan.items() if name != "captions"}))
    run_tokenize(recipe)
    assert json.loads(path.read_text()) == plan
    flip(tmp_path / "input" / "names.json", -4)
    with pytest.raises(RecipeError, match=r"class captions .*names\.json were replaced"):
        run_tokenize(recipe)


def test_a_picture_that_moves_to_a_shard_of_another_slice_is_told(tokenizers, tmp_path):
    """Each shard has as many pictures as before, and the two slices together one of them twice."""
    recipe = recipe_for(tokenizers, tmp_path, "folder")
    run_tokenize(recipe, Slice(0, 2))
    (tmp_path / "input" / "0.jpg").rename(tmp_path / "input" / "4.jpg")
    with pytest.raises(DataError, match=r"task 00000: .*input\[0:2\] has changed since\n"):
        run_tokenize(recipe, Slice(1, 2))


def test_a_part_that_is_not_the_listed_one_any_more_is_not_begun(tmp_path):
    """A worker process walks the folder anew, maybe long after the job has listed it."""
    section = InputSection.model_validate({"kind": "folder"} | write_folder(tmp_path))
    shards = list_shards(section)
    (tmp_path / "00.jpg").write_bytes(PHOTOS[0])
    loose_files._listing.cache_clear()
    for shard in shards:
        with pytest.raises(DataError, match=r"\[.:.\] changed while it was read"):
            shard_version(shard, section)


def test_a_failed_part_that_was_mended_is_tried_again(tokenizers, tmp_path):
    recipe = recipe_for(tokenizers, tmp_path, "folder").model_copy(update={"max_bad_fraction": 0.0})
    (tmp_path / "input" / "1.txt").write_bytes(bytes((4 << 20) + 1))
    with pytest.raises(DataError, match=r"1\.jpg: its 1\.txt is over the cap of 4194304 bytes"):
        run_tokenize(recipe)
    (tmp_path / "input" / "1.txt").write_text("short")
    run_tokenize(recipe)


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_what_was_not_touched_is_not_opened_again(tokenizers, tmp_path, monkeypatch, kind):
    """A large input costs a later run its listing alone."""
    recipe = recipe_for(tokenizers, tmp_path, kind)
    run_tokenize(recipe)
    for marker in (tmp_path / "latents" / "tasks").glob("*/done.json"):
        os.utime(marker, (time.time() + 3600,) * 2)  # the input is an hour older
    monkeypatch.setattr("data_pipeline.ingest.versions.file_version", lambda *_: 1 / 0)
    run_tokenize(recipe)


def test_an_edit_is_told_though_the_inputs_clock_is_five_minutes_behind(tmp_path):
    section = InputSection.model_validate({"kind": "folder"} | write_folder(tmp_path))
    shard = list_shards(section)[0]
    version = shard_version(shard, section)
    assert not has_changed(shard, section, version, since=time.time() + 300)
    flip(tmp_path / "0.jpg")
    assert has_changed(shard, section, version, since=time.time() + 300)
