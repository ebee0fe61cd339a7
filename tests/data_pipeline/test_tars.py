"""Image tars: what is read, what is refused, and that damage never passes for an end."""

import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.ingest.samples import RawSample, Refused
from data_pipeline.ingest.tars import read_tar
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
        ([("a.jpg", b"x" * (CAP + 1))], "over the cap"),
    ],
)
def test_bad_samples_are_refused_one_by_one(members, reason):
    found = read(make_tar([*members, *sample("good")]))
    assert [type(s) for s in found if s.key.startswith("a")] == [Refused]
    assert reason in next(s for s in found if isinstance(s, Refused)).reason
    assert [s.key for s in found if isinstance(s, RawSample)] == ["good"]


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
