"""Image tars: what is read, what is refused, and that damage never passes for an end."""

import io
import json
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.ingest.samples import CAPTION_BYTES, JSON_BYTES, RawSample, Refused
from data_pipeline.ingest.tars import DAMAGE, read_tar, tars_inside
from foundation.errors import DataError

CAP = 1 << 20


def make_tar(members):
    """`members`: (name, bytes) or a TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def read(data):
    return list(read_tar(io.BytesIO(data), "x.tar", CAP))


def sample(key, caption="a cat", **fields):
    body = {"caption": caption, "key": key, "status": "success"} | fields
    return [(f"{key}.jpg", b"jpg" + key.encode()), (f"{key}.json", json.dumps(body).encode())]


def test_samples_in_the_tars_order():
    members = [*sample("b"), ("a.png", b"png"), ("a.txt", "ein Bär".encode())]
    one, two = read(make_tar(members))
    assert one == RawSample("b", b"jpgb", "a cat", {"caption": "a cat", "key": "b", "status": "success"})
    assert two == RawSample("a", b"png", "ein Bär", {})


def test_the_text_member_goes_before_the_json():
    (one,) = read(make_tar([*sample("a", caption="from json"), ("a.txt", b"from txt")]))
    assert isinstance(one, RawSample)
    assert one.caption == "from txt"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.txt", b"no picture")], "no picture"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "json cannot be read"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "not an object"),
        (sample("a", status="failed_to_resize"), "failed_to_resize"),
        ([("a.jpg", b"x" * (CAP + 1)), ("a.txt", b"a cat")], "a.jpg has 1048577 bytes, over the cap"),
        ([("a.jpg", b"x"), ("a.json", b"[" * (JSON_BYTES + 1))], "a.json has 1048577 bytes, over the cap"),
        ([("a.jpg", b"x"), ("a.JSON", b"1," * JSON_BYTES)], "over the cap of 1048576"),
        ([("a.jpg", b"x"), ("a.txt", b" " * (CAPTION_BYTES + 1))], "over the cap of 4194304"),
        ([("a.cls", b"7"), ("a.txt", b"no picture")], "no picture"),
        ([("a.cls", b"only what nobody looks at")], "no picture"),
    ],
)
def test_bad_samples_are_refused_one_by_one(members, reason):
    found = read(make_tar([*members, *sample("good")]))
    assert [type(s) for s in found if s.key.startswith("a")] == [Refused]
    assert reason in next(s for s in found if isinstance(s, Refused)).reason
    assert [s.key for s in found if isinstance(s, RawSample)] == ["good"]


def test_captions_and_json_up_to_their_caps_are_read():
    body = json.dumps({"caption": "from json"}).encode().ljust(JSON_BYTES)
    one, two = read(
        make_tar([("a.jpg", b"x"), ("a.json", body), ("b.jpg", b"x"), ("b.txt", b"t" * CAPTION_BYTES)])
    )
    assert one == RawSample("a", b"x", "from json", {"caption": "from json"})
    assert two == RawSample("b", b"x", "t" * CAPTION_BYTES, {})


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.npy", "a.seg.png"])
def test_what_is_over_its_cap_or_of_no_use_never_comes_into_memory(name):
    """Far below its 64 MB: neither the member's bytes, nor what would be parsed of them."""
    data = make_tar([("a.jpg", b"x"), (name, b"[1]," * (16 << 20)), *sample("good")])
    stream = io.BytesIO(data)
    tracemalloc.start()
    try:
        found = list(read_tar(stream, "x.tar", CAP))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    used = name in ("a.npy", "a.seg.png")
    assert [(s.key, type(s)) for s in found] == [("a", RawSample if used else Refused), ("good", RawSample)]


@pytest.mark.parametrize("extension", ["__key__", "__url__", "__bad__", "__local_path__"])
def test_names_of_the_libraries_own_do_no_harm(extension):
    found = read(make_tar([("a.jpg", b"x"), (f"a.{extension}", b"x"), ("a.txt", b"a cat"), *sample("b")]))
    assert [(s.key, s.caption) for s in found if isinstance(s, RawSample)] == [("a", "a cat"), ("b", "a cat")]


def test_duplicate_keys_count_once():
    found = read(make_tar([*sample("a"), *sample("b"), *sample("a"), ("c.jpg", b"1"), ("c.jpg", b"2")]))
    assert [s.key for s in found if isinstance(s, RawSample)] == ["a", "b", "c"]
    assert [s.key for s in found if isinstance(s, Refused)] == ["a", "c"]


@pytest.mark.parametrize(
    "member",
    [
        ("/etc/passwd.jpg", b"x"),
        ("../up.jpg", b"x"),
        ("a/../../up.jpg", b"x"),
        ("a\\..\\up.jpg", b"x"),
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "a.jpg"),
        special("device.jpg", tarfile.CHRTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
    ],
)
def test_forbidden_members_refuse_the_shard(member):
    with pytest.raises(DataError, match="refused as a whole"):
        read(make_tar([*sample("a"), member]))


def test_every_cut_is_noticed():
    data = make_tar([*sample("a"), *sample("b")])
    content = len(data.rstrip(b"\0"))
    for cut in range(0, content + 1, 97):
        with pytest.raises(DataError):
            read(data[:cut])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_damaged_header_never_passes_for_the_end(place, flip):
    data = bytearray(make_tar([*sample("a"), *sample("b"), *sample("c")]))
    headers = [0, 1024, 2048, 3072, 4096, 5120]
    at = headers[place % len(headers)] + place % 512
    data[at] ^= flip
    try:
        found = read(bytes(data))
    except DataError:
        return
    # Where the damage is not noticed it was in padding that the checksum's own field allows for.
    assert len([s for s in found if isinstance(s, RawSample)]) == 3


def test_what_is_no_tar_is_refused():
    with pytest.raises(DataError, match=r"x\.tar is no tar, damaged or cut short"):
        read(b"hello" * 1000)


class Counted(io.BytesIO):
    """A file that is not read for ever."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        assert self.reads < 200, "it is read without end"
        return super().read(size)


def header(name, size, kind=b"0"):
    """A header that claims any number of bytes, in base 256 where octal digits do not hold it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else (size % (1 << 96)).to_bytes(12, "big")
    if not 0 <= size < 8**11:
        block[124] = 0xFF if size < 0 else 0x80
    block[148:156], block[156:157], block[257:265] = b" " * 8, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def attributes(text):
    """An extended header about the next member."""
    return header(b"x", len(text), b"x") + text.ljust(-(-len(text) // 512) * 512, b"\0")


MEMBER = header(b"n02.tar", 0)
LIES = {
    "negative": header(b"n02.tar", -512),
    "back to the first": header(b"n02.tar", -4096),
    "2^40": header(b"n02.tar", 1 << 40),
    "2^70": header(b"n02.tar", 1 << 70),
    "extended header of 2^40": header(b"x", 1 << 40, b"x") + MEMBER,
    "extended header of 1 MB": attributes(b"1" * (1 << 20)) + MEMBER,
    "negative long name": header(b"././@LongLink", -512, b"L") + MEMBER,
    "negative by attribute": attributes(b"15 size=-10240\n") + MEMBER,
    "2^70 by attribute": attributes(b"30 size=%d\n" % (1 << 70)) + MEMBER,
    "sparse": header(b"n02.tar", 512, b"S") + b"\xff" * 512,
    "sparse by attribute": attributes(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + MEMBER,
    "global size": header(b"g", 11, b"g") + b"11 size=-5\n".ljust(512, b"\0") + MEMBER,
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_about_sizes_refuse_the_tar_at_once(lie):
    members = [("n01.tar", b"x" * 700), ("n01.jpg", b"x")]
    honest = make_tar(members).rstrip(b"\0")
    honest += bytes(-len(honest) % 512)
    for start in (b"", honest):
        data = start + LIES[lie] + bytes(1024)
        with pytest.raises(DataError, match=r"damaged or cut short|is a device or another special"):
            list(read_tar(Counted(data), "x.tar", CAP))
        with pytest.raises(DAMAGE):
            assert not list(tars_inside(Counted(data), len(data)))


@pytest.mark.parametrize("below", [["."], ["train", "train/deep"]])
def test_folders_before_the_first_tar_do_not_hide_that_it_is_a_tar_of_tars(below):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for folder in below:
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name in ("n01.tar", "n02.tar"):
            member = tarfile.TarInfo(f"{below[-1]}/{name}")
            member.size = 700
            tar.addfile(member, io.BytesIO(b"x" * 700))
    start = 512 * (len(below) + 1)
    found = list(tars_inside(io.BytesIO(data.getvalue()), len(data.getvalue())))
    assert found == [("n01.tar", start, 700), ("n02.tar", start + 1536, 700)]


def test_a_tar_of_tars_with_a_damaged_header_is_not_taken_for_a_shorter_one():
    data = bytearray(make_tar([("n01.tar", b"x" * 700), ("n02.tar", b"y" * 10)]))
    whole = [("n01.tar", 512, 700), ("n02.tar", 2048, 10)]
    assert list(tars_inside(io.BytesIO(data), len(data))) == whole
    data[1536] ^= 1
    with pytest.raises(tarfile.ReadError, match="no end mark at byte 1536"):
        list(tars_inside(io.BytesIO(data), len(data)))
