"""One bad sample is one line of a quarantine list, whatever is bad about it; a bad shard is a failed task."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import picture, tokenize_recipe, write_tar, write_tokenizer
from PIL import Image

import data_pipeline.tokenize.decoding as decoding
from data_pipeline.ingest.kept import KeptRows, index_folder
from data_pipeline.ingest.recipe import InputSection, KeepSection
from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.shards import list_shards, read_shard
from data_pipeline.metadata.schema import SCORES
from data_pipeline.status import read_status
from data_pipeline.tokenize.run import run_tokenize
from data_pipeline.tokenize.task import TaskRunner
from foundation.errors import DataError

PHOTO = picture(1, 64, 64)
DEEP = "[" * 200_000


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A binary and a text tokenizer."""
    from models.text_tokens import train_text_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(folder / "tokenizer")
    train_text_tokenizer(["a good picture"] * 3, 270).save_pretrained(folder / "text")
    return folder


def recipe_for(tokenizers, tmp_path, **more):
    places = {"tokenizer": str(tokenizers / "tokenizer"), "output": str(tmp_path / "latents")}
    text = {"text_tokenizer": {"name": str(tokenizers / "text")}}
    return tokenize_recipe(tmp_path, **places, **text, near_duplicates=None, **more)


def good_members(count=8):
    for i in range(count):
        yield f"{i:04d}.jpg", picture(i, 64, 64)
        yield f"{i:04d}.txt", b"a good picture"


def quarantine(tmp_path, task=0):
    path = tmp_path / "latents" / "tasks" / f"{task:05d}" / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (DEEP + "]" * 200_000, "json cannot be read"),
        ('{"a":' + "[" * 900 + "]" * 900 + "}", None),
        ('{"similarity": 1' + "0" * 400 + "}", None),
        (json.dumps({"exif": '{"Image Orientation":' + DEEP}), None),
        (json.dumps({"exif": '{"Image Orientation":"' + "9" * 5000 + '"}'}), None),
        ('{"hash": 1' + "0" * 400 + "}", None),
        ('{"url": "\\ud800", "caption": "\\ud800"}', None),
    ],
    ids=["deep", "deep within limits", "huge number", "deep exif", "long exif", "huge hash", "surrogate"],
)
@pytest.mark.parametrize("decoders", [0, 1])
def test_a_tar_with_a_strange_json_is_read_but_for_it(tokenizers, tmp_path, body, reason, decoders):
    (tmp_path / "in").mkdir()
    members = [*good_members(), ("x.jpg", PHOTO), ("x.json", body.encode()), ("x.txt", b"strange")]
    write_tar(tmp_path / "in" / "0.tar", members)
    section = {"path": [str(tmp_path / "in")]}
    if decoders and reason is None and "exif" in body:
        pytest.skip("the decode worker reads the exif the same way; one start of a worker is enough")
    compute = {"processes": 0, "decoders": decoders}
    run_tokenize(recipe_for(tokenizers, tmp_path, input=section, compute=compute))
    refused = quarantine(tmp_path)
    assert [line["key"] for line in refused] == (["x"] if reason else [])
    assert all(reason in line["reason"] for line in refused)


def test_names_that_are_not_utf8_are_refused(tokenizers, tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "0.tar",
        [*good_members(), ("caf\udce9.jpg", PHOTO), ("caf\udce9.txt", b"a good picture")],
    )
    run_tokenize(recipe_for(tokenizers, tmp_path, input={"path": [str(tmp_path / "in")]}))
    assert quarantine(tmp_path) == [{"key": "caf\\udce9", "reason": "its name is not UTF-8"}]

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (b"good.jpg", b"caf\xe9.jpg"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(PHOTO)
    section = InputSection(kind="folder", path=[str(folder)])
    found = [s for shard in list_shards(section) for s in read_shard(shard, section)]
    assert [(s.key, type(s)) for s in found] == [("caf\\udce9.jpg", Refused), ("good.jpg", RawSample)]

    os.rename(tmp_path / "in" / "0.tar", os.path.join(os.fsencode(tmp_path / "in"), b"caf\xe9.tar"))
    with pytest.raises(DataError, match=r"caf\\udce9\.tar: its name is not UTF-8"):
        list_shards(InputSection(path=[str(tmp_path / "in")]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "", "caption": "x"}', "is no file"),
        ('{"image": "a\\u0000b", "caption": "x"}', "is no file"),
        (json.dumps({"image": "x" * 5000, "caption": "x"}), "is no file"),
        ('{"image": "\\ud800.jpg", "caption": "x"}', "is no file"),
        ('{"image": "pipe.jpg", "caption": "x"}', "is no file"),
        ('{"image": "a.jpg", "caption": "x", "key": "\\ud800"}', "is not UTF-8"),
        ('{"image": "a.jpg", "caption": "x", "key": "7"}', "duplicate key '7'"),
        (DEEP, "no JSON"),
    ],
    ids=["empty", "NUL", "5000 characters", "surrogate path", "pipe", "surrogate key", "duplicate", "deep"],
)
def test_a_manifest_with_a_strange_line_is_read_but_for_it(tokenizers, tmp_path, line, reason):
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    os.mkfifo(tmp_path / "pipe.jpg")
    lines = [json.dumps({"image": "a.jpg", "caption": f"good {i}", "key": i}) for i in range(8)]
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, line]))
    section = {"kind": "jsonl", "path": [str(tmp_path / "m.jsonl")]}
    run_tokenize(recipe_for(tokenizers, tmp_path, input=section))
    (refused,) = quarantine(tmp_path)
    assert reason in refused["reason"]


def test_strange_identities_join_nothing(tmp_path):
    columns = {"url": ["https://a.example/1"], "hash": [7], "caption": ["c"]}
    table = pa.table(columns | {name: pa.array([1.0]) for name in SCORES})
    pq.write_table(table, tmp_path / "kept.parquet")
    (tmp_path / "a.jpg").write_bytes(PHOTO)
    lines = [
        {"hash": 10**400},
        {"hash": 1 << 63},
        {"url": "\ud800"},
        {"hash": 7, "url": "https://a.example/1"},
    ]
    text = "\n".join(json.dumps({"image": "a.jpg"} | line) for line in lines)
    (tmp_path / "m.jsonl").write_text(text + '\n{"image": "a.jpg", "hash": Infinity}')
    from data_pipeline.ingest.shards import shard_identities

    section = InputSection(kind="jsonl", path=[str(tmp_path / "m.jsonl")])
    for by, key in (("hash", 7), ("url", "https://a.example/1")):
        (shard,) = list_shards(section)
        index = index_folder(KeepSection(rows=str(tmp_path / "kept.parquet"), by=by))
        assert list(KeptRows(by, index).rows(shard_identities(shard, section, by))) == [key]


def test_a_picture_that_raises_what_nobody_foresaw_is_refused_alone(tokenizers, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    short = io.BytesIO()
    Image.new("RGB", (64, 64)).save(short, "JPEG", dpi=(72, 72), exif=b"Exif\0\0II*\0")
    write_tar(
        tmp_path / "in" / "0.tar",
        [*good_members(), ("short.jpg", short.getvalue()), ("short.txt", b"a short EXIF block")],
    )
    hashed = decoding.perceptual_hash

    def fails_on_black(image):
        if not any(image.getextrema()[0]):
            raise LookupError("what nobody foresaw")
        return hashed(image)

    recipe = recipe_for(tokenizers, tmp_path, input={"path": [str(tmp_path / "in")]})
    monkeypatch.setattr(decoding, "perceptual_hash", fails_on_black)
    run_tokenize(recipe)
    (refused,) = quarantine(tmp_path)
    assert refused == {"key": "short", "reason": "cannot be decoded: LookupError: what nobody foresaw"}
    assert read_status(recipe.output).counts["refused"] == 1


@pytest.mark.parametrize("error", [RuntimeError("what nobody foresaw"), OSError(22, "Invalid argument")])
def test_what_nobody_foresaw_fails_its_task_and_the_others_are_done(tokenizers, tmp_path, monkeypatch, error):
    (tmp_path / "in").mkdir()
    for name in ("0", "1"):
        write_tar(tmp_path / "in" / f"{name}.tar", good_members())
    recipe = recipe_for(tokenizers, tmp_path, input={"path": [str(tmp_path / "in")]})
    run = TaskRunner.run

    def fails_on_the_first(runner, number):
        if number == 0:
            raise error
        return run(runner, number)

    monkeypatch.setattr(TaskRunner, "run", fails_on_the_first)
    said = rf"1 of 2 tasks failed(.|\n)*0\.tar: {type(error).__name__}.*{error.args[-1]}"
    with pytest.raises(DataError, match=said):
        run_tokenize(recipe)
    status = read_status(recipe.output)
    assert status.done == 1 and list(status.failed) == [0]
