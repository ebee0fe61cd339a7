"""Every kind of input: folders with captions, classes, manifests, parquet, ImageNet's tars."""

import contextlib
import errno
import io
import json
import os
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photo_shards import picture, write_tar

from data_pipeline.ingest import loose_files, manifests, storage
from data_pipeline.ingest.recipe import InputSection
from data_pipeline.ingest.samples import CAPTION_BYTES, JSON_BYTES, RawSample, Refused
from data_pipeline.ingest.shards import list_shards, read_shard, shard_identities
from foundation.errors import DataError

PHOTOS = [picture(seed, 8, 8) for seed in range(5)]


def section(kind, *paths, **more):
    return InputSection.model_validate({"kind": kind, "path": [str(p) for p in paths]} | more)


def everything(part):
    """All samples as (key, picture, caption), and the number of shards."""
    shards = list_shards(part)
    found = [s for shard in shards for s in read_shard(shard, part)]
    assert not [s for s in found if isinstance(s, Refused)]
    return [(s.key, s.image, s.caption) for s in found if isinstance(s, RawSample)], len(shards)


def test_a_glob_takes_the_shards_among_what_lies_beside_them(tmp_path):
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("a.jpg", PHOTOS[0])])
        (tmp_path / name.replace(".tar", "_stats.json")).write_text("{}")
        (tmp_path / name.replace(".tar", ".parquet")).write_bytes(b"x")
    shards = list_shards(section("webdataset", tmp_path / "*"))
    assert [shard.path for shard in shards] == [f"{tmp_path}/0.tar", f"{tmp_path}/1.tar"]
    (tmp_path / "0.tar").rename(tmp_path / "part-0")  # without the suffix, as some tools write
    assert [s.path for s in list_shards(section("webdataset", f"{tmp_path}/part-*", incomplete="read"))] == [
        f"{tmp_path}/part-0"
    ]


def test_folder_with_captions_is_cut_by_number(tmp_path):
    for i, photo in enumerate(PHOTOS):
        path = tmp_path / ("sub" if i % 2 else "") / f"p{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo)
        if i != 4:
            path.with_suffix(".txt").write_text(f"caption {i}")
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "link.jpg").symlink_to("/etc/passwd")
    found, shards = everything(section("folder", tmp_path, samples_per_shard=2))
    assert shards == 3
    assert found == [
        ("p0.jpg", PHOTOS[0], "caption 0"),
        ("p2.jpg", PHOTOS[2], "caption 2"),
        ("p4.jpg", PHOTOS[4], None),
        ("sub/p1.jpg", PHOTOS[1], "caption 1"),
        ("sub/p3.jpg", PHOTOS[3], "caption 3"),
    ]


def test_class_folders_take_their_captions_from_the_classes(tmp_path):
    for name in ("tabby_cat", "n02"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.JPEG").write_bytes(PHOTOS[0])
    (tmp_path / "names.json").write_text(json.dumps({"n02": "a tench"}))
    found, _ = everything(section("classes", tmp_path / "train", captions=str(tmp_path / "names.json")))
    assert [(key, caption) for key, _, caption in found] == [
        ("n02/a.JPEG", "a tench"),
        ("tabby_cat/a.JPEG", "tabby cat"),
    ]


def test_imagenets_tar_of_tars_is_a_shard_per_class(tmp_path):
    inner = {}
    for place, name in enumerate(("n01", "n02")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i in range(2):
                info = tarfile.TarInfo(f"{name}_{i}.JPEG")
                info.size = len(PHOTOS[2 * place + i])
                tar.addfile(info, io.BytesIO(PHOTOS[2 * place + i]))
        inner[f"{name}.tar"] = buffer.getvalue()
    write_tar(tmp_path / "train.tar", inner.items())
    found, shards = everything(section("class_tars", tmp_path / "train.tar"))
    assert shards == 2
    assert found == [(f"n0{1 + i // 2}_{i % 2}", PHOTOS[i], f"n0{1 + i // 2}") for i in range(4)]
    # The same tars unpacked once give the same samples.
    for name, data in inner.items():
        (tmp_path / name).write_bytes(data)
    again, _ = everything(section("class_tars", tmp_path / "n0*.tar"))
    assert again == found


def test_jsonl_manifest(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for i, photo in enumerate(PHOTOS):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(photo)
        lines.append(json.dumps({"image": f"images/{i}.jpg", "caption": f"caption {i}", "uid": str(i)}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    part = section("jsonl", tmp_path / "m.jsonl", samples_per_shard=3)
    found, shards = everything(part)
    assert shards == 2
    assert found == [(f"m.jsonl:{i + 1}", PHOTOS[i], f"caption {i}") for i in range(5)]
    assert [shard_identities(shard, part, "uid") for shard in list_shards(part)] == [
        ["0", "1", "2"],
        ["3", "4"],
    ]


def test_hidden_files_and_what_macos_adds_are_no_samples(tmp_path):
    places = ("cat/a.jpg", "cat/._a.jpg", ".hidden/a.jpg", "__MACOSX/cat/a.jpg", "cat/.thumbs/b.jpg")
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(PHOTOS[0])
    for kind, caption in (("folder", None), ("classes", "cat")):
        assert everything(section(kind, tmp_path))[0] == [("cat/a.jpg", PHOTOS[0], caption)]


def test_a_picture_beside_the_class_folders_is_refused_and_missing_captions_are_told(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    for name in ("cat", "tabby_dog"):
        (pictures / name).mkdir(parents=True)
        (pictures / name / "a.jpg").write_bytes(PHOTOS[0])
    (pictures / "cover.jpg").write_bytes(PHOTOS[1])
    (tmp_path / "names.json").write_text('{"cat": "a cat"}')
    part = section("classes", pictures, captions=str(tmp_path / "names.json"), samples_per_shard=1)
    found = [s for shard in list_shards(part) for s in read_shard(shard, part)]
    assert Refused("cover.jpg", "lies in no class's folder") in found
    assert [s.caption for s in found if isinstance(s, RawSample)] == ["a cat", "tabby dog"]
    said = f"1 classes lack a caption in {tmp_path}/names.json and have their names: tabby_dog\n"
    assert capsys.readouterr().out == said
    write_tar(tmp_path / "cat.tar", [("a.jpg", PHOTOS[0])])
    write_tar(tmp_path / "dog.tar", [("a.jpg", PHOTOS[0])])
    list_shards(section("class_tars", tmp_path / "*.tar", captions=str(tmp_path / "names.json")))
    assert capsys.readouterr().out == said.replace("tabby_dog", "dog")
    (tmp_path / "names.json").write_text('["cat"]')
    with pytest.raises(DataError, match=r"names\.json is not an object of class name -> caption"):
        list_shards(part)


def test_a_caption_over_its_cap_refuses_its_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "a.txt").write_bytes(b"x" * (CAPTION_BYTES + 1))
    (tmp_path / "b.jpg").write_bytes(PHOTOS[1])
    (tmp_path / "b.txt").write_bytes(b"y" * CAPTION_BYTES)
    part = section("folder", tmp_path)
    bad, good = read_shard(list_shards(part)[0], part)
    assert bad == Refused("a.jpg", f"its a.txt is over the cap of {CAPTION_BYTES} bytes")
    assert len(good.caption) == CAPTION_BYTES


def test_blank_lines_are_no_samples_and_a_line_over_the_cap_is_never_held(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    good = '{"image": "a.jpg", "caption": "c"}\n'
    with open(tmp_path / "m.jsonl", "w") as file:
        file.write("\n" + good + "  \r\n")
        for _ in range(64):
            file.write(" " * (1 << 20))
        file.write('{"image": "a.jpg"}\n' + good + "\n\n\n\n\n\n")
    part = section("jsonl", tmp_path / "m.jsonl", samples_per_shard=5, max_member_bytes=JSON_BYTES)
    tracemalloc.start()
    shards = list_shards(part)
    first, long, last = (s for shard in shards for s in read_shard(shard, part))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(s.key, s.caption) for s in (first, last)] == [("m.jsonl:2", "c"), ("m.jsonl:5", "c")]
    size = (64 << 20) + 19
    assert long == Refused("m.jsonl:4", f"its line has {size} bytes, over the cap of {JSON_BYTES}")
    assert held < 5 * JSON_BYTES
    assert [(shard.first, shard.count) for shard in shards] == [(0, 5)], "five blank lines are no shard"


@pytest.mark.parametrize("kind", ["folder", "classes", "jsonl", "class_tars"])
def test_what_may_not_be_read_while_shards_are_listed_is_bad_data(tmp_path, monkeypatch, kind):
    """Not an output that cannot be written, as whose error it would pass else."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "m.jsonl").write_text('{"image": "a/a.jpg"}')
    write_tar(tmp_path / "t.tar", [("a.jpg", PHOTOS[0])])
    closed = {"jsonl": tmp_path / "m.jsonl", "class_tars": tmp_path / "t.tar"}.get(kind, tmp_path / "a")

    def deny(real):
        def denied(path, *arguments, **more):
            if os.fspath(path) == str(closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(closed))
            return real(path, *arguments, **more)

        return denied

    part = section(kind, closed if closed.is_file() else tmp_path)
    monkeypatch.setattr(os, "scandir", deny(os.scandir))
    monkeypatch.setattr(storage, "open", deny(open), raising=False)
    with pytest.raises(
        DataError, match=rf"{closed}: cannot be read: Permission denied \(give rights"
    ) as error:
        list_shards(part)
    assert error.value.exit_code == 65


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[]", "is not"),
        ('{"image": "http://169.254.169.254/x.jpg"}', "download it first"),
        ('{"image": "none.jpg"}', "does not exist"),
    ],
)
def test_bad_manifest_lines_are_refused_one_by_one(tmp_path, line, reason):
    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "m.jsonl").write_text(line + '\n{"image": "a.jpg", "caption": "c"}\n')
    part = section("jsonl", tmp_path / "m.jsonl")
    bad, good = (s for shard in list_shards(part) for s in read_shard(shard, part))
    assert isinstance(bad, Refused) and reason in bad.reason and bad.key == "m.jsonl:1"
    assert isinstance(good, RawSample) and good.caption == "c"


def test_hugging_face_parquet(tmp_path):
    rows = [
        {"image": {"bytes": p, "path": None}, "label": f"caption {i}", "uid": f"{i}"}
        for i, p in enumerate(PHOTOS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    part = section("parquet", tmp_path, caption_column="label")
    found, _ = everything(part)
    assert found == [(f"t.parquet:{i}", PHOTOS[i], f"caption {i}") for i in range(5)]
    assert shard_identities(list_shards(part)[0], part, "uid") == ["0", "1", "2", "3", "4"]
    with pytest.raises(DataError, match="expected image and 'text'"):
        everything(section("parquet", tmp_path))


def test_a_glob_of_folders(tmp_path):
    for name in ("a1", "a2", "b1", "a[3]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "a4").write_text("no folder")
    shards = list_shards(section("folder", tmp_path / "a[12]", tmp_path / "a[3]"))
    assert [shard.path for shard in shards] == [str(tmp_path / name) for name in ("a1", "a2", "a[3]")]


@pytest.mark.parametrize("kind", ["webdataset", "folder", "classes", "class_tars", "jsonl", "parquet"])
def test_nothing_there_is_said(tmp_path, kind):
    with pytest.raises(DataError, match=f"no pictures of kind '{kind}'"):
        list_shards(section(kind, tmp_path / "nowhere"))


def test_unfinished_downloads_are_refused_skipped_or_read(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [("a.jpg", PHOTOS[i])])
    assert len(list_shards(section("webdataset", tmp_path))) == 3  # nobody wrote _stats.json here
    (tmp_path / "0_stats.json").write_text("{}")
    with pytest.raises(DataError, match=r"1\.tar: has no 1_stats\.json(.|\n)*2\.tar"):
        list_shards(section("webdataset", tmp_path))
    assert len(list_shards(section("webdataset", tmp_path, incomplete="skip"))) == 1
    assert len(list_shards(section("webdataset", tmp_path, incomplete="read"))) == 3


class Counted:
    """A stream that notes the lines that are taken from it."""

    def __init__(self, stream, taken):
        self.stream, self.taken, self.seek = stream, taken, stream.seek

    def readline(self, limit):
        line = self.stream.readline(limit)
        self.taken.append(line)
        return line


@pytest.fixture
def twelve(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        (tmp_path / "pictures" / f"{i:02d}.jpg").write_bytes(PHOTOS[i % 5])
    return tmp_path


def test_a_folder_is_walked_once_for_all_of_its_parts(twelve, monkeypatch):
    walks, real = [], loose_files.files_below

    def walk(folder):
        walks.append(folder)
        return real(folder)

    monkeypatch.setattr(loose_files, "files_below", walk)
    part = section("folder", twelve / "pictures", samples_per_shard=1)
    shards = list_shards(part)
    keys = [sample.key for shard in shards for sample in read_shard(shard, part)]
    assert keys == [f"{i:02d}.jpg" for i in range(12)] and len(walks) == 1
    (twelve / "pictures" / "12.jpg").write_bytes(PHOTOS[0])
    assert len(list_shards(part)) == 13, "a new list is of what is there now"


def test_of_a_manifest_each_part_reads_its_own_lines_alone(twelve, monkeypatch):
    lines = [json.dumps({"image": f"pictures/{i:02d}.jpg", "caption": "ä" * i}) + "\n" for i in range(12)]
    (twelve / "m.jsonl").write_text("".join(lines))
    part = section("jsonl", twelve / "m.jsonl", samples_per_shard=5)
    shards = list_shards(part)
    assert [(shard.first, shard.count) for shard in shards] == [(0, 5), (5, 5), (10, 2)]
    assert [shard.size for shard in shards] == [len("".join(lines[i : i + 5])) for i in (0, 5, 10)]
    taken, real = [], manifests.open_stream

    @contextlib.contextmanager
    def counted(path):
        with real(path) as stream:
            yield Counted(stream, taken) if path.endswith(".jsonl") else stream

    monkeypatch.setattr(manifests, "open_stream", counted)
    found = [sample for shard in reversed(shards) for sample in read_shard(shard, part)]
    order = [10, 11, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert [(s.key, s.caption) for s in found] == [(f"m.jsonl:{i + 1}", "ä" * i) for i in order]
    assert taken == [lines[i].encode() for i in order]
