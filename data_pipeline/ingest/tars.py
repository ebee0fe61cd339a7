"""WebDataset tars, of img2dataset and others: no member is trusted, and none is ever extracted to a path.

Members with absolute names, with `..`, links and devices refuse the whole shard: no honest tool writes
them. A tar that ends early is refused whole, too: half a shard that passes for a whole one would never be
noticed.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any, cast

from data_pipeline.ingest.samples import (
    CAPTION_BYTES,
    JSON_BYTES,
    RawSample,
    Refused,
    foreign_json,
    plain_values,
)
from foundation.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
CAPTION_EXTENSIONS = ("txt", "caption", "text")
BUFFER_BYTES = 1 << 16  # tarfile copies what is left of it at each read of a header
# Headers about the next member: their content is a long name, or attributes.
EXTENDED_TYPES = (b"x", b"g", b"X", b"L", b"K")
EXTENDED_BYTES = 1 << 14  # of such a content: it is read whole, and parsed in time that grows with its square
# What tarfile raises about headers that lie, besides its own errors.
DAMAGE = (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError)
MEND = "fetch it again, or take it out of the recipe's input"


def read_tar(stream: IO[bytes], name: str, max_member: int) -> Iterator[RawSample | Refused]:
    """The samples of a tar, in its order.

    Args:
        stream: the tar, read once from front to back.
        name: for messages.
        max_member: cap in bytes on a picture's size; captions and JSON have caps of their own.

    Raises:
        DataError: the tar is damaged, cut short, compressed, or has a forbidden member.
    """
    from webdataset.tariterators import group_by_keys

    seen: set[str] = set()
    clashes: list[Refused] = []
    members = _distinct(_members(stream, name, max_member), clashes)
    for group in group_by_keys(members):
        key = group["__key__"]
        if key in seen:
            # The members of a sample lie together; a key that comes back is another sample of the same name.
            yield Refused(key, "duplicate key in its shard")
            continue
        seen.add(key)
        yield _sample(key, group)
        yield from clashes
        clashes.clear()
    yield from clashes


def _members(stream: IO[bytes], name: str, max_member: int) -> Iterator[dict[str, Any]]:
    """The regular files of a tar as webdataset's grouping takes them, after checking each member; in place of
    the content of one over its cap the reason why its sample is refused."""
    caps = {
        **dict.fromkeys(IMAGE_EXTENSIONS, max_member),
        **dict.fromkeys(CAPTION_EXTENSIONS, CAPTION_BYTES),
        "json": JSON_BYTES,
    }
    watched = _Watched(stream)
    try:
        with tarfile.open(
            fileobj=cast(IO[bytes], watched), mode="r|", bufsize=BUFFER_BYTES, tarinfo=Header
        ) as tar:
            for member in tar:
                _check_member(member, name)
                if member.size < 0:  # by an attribute
                    raise tarfile.ReadError(f"{member.name!r} claims {member.size} bytes")
                key, extension = _key_and_extension(member.name)
                if member.isreg() and not extension.startswith("__"):  # names of webdataset's own
                    cap = caps.get(extension)
                    # What nobody looks at only shows that there is such a sample.
                    data = b"" if cap is None else _content(tar, member, key, cap)
                    yield {"fname": member.name, "data": data, "__url__": name}
            end = tar.offset
    except DAMAGE as error:
        raise DataError(f"{name} is no tar, damaged or cut short ({error}); {MEND}") from None
    if not watched.ends_at(end):
        raise DataError(f"{name} is damaged or cut short behind byte {end}; {MEND}")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str, cap: int) -> bytes | Refused:
    if member.size > cap:
        base = PurePosixPath(member.name).name
        return Refused(key, f"its {base} has {member.size} bytes, over the cap of {cap}")
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _key_and_extension(name: str) -> tuple[str, str]:
    """A member's name, cut at the first dot behind its folders; the extension in small letters."""
    extension = name.rpartition("/")[2].partition(".")[2]
    return name.removesuffix(f".{extension}"), extension.lower()


def tars_inside(stream: IO[bytes], size: int) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and bytes of each tar in a tar; none where its first file is not one.

    Args:
        stream: the outer tar, which can be searched.
        size: its bytes.

    Raises:
        one of DAMAGE: it is damaged, cut short, compressed, or no tar.
    """
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=Header) as tar:
        head = next((member for member in tar if not member.isdir()), None)
        if head is None or not head.name.endswith(".tar"):
            return
        for member in tar:  # from the first one again
            # Looked at before tarfile goes to where the next header would be: behind the end, or back.
            if member.issparse() or not 0 <= member.size <= size - member.offset_data:
                raise tarfile.ReadError(f"{member.name!r} is sparse, or claims {member.size} bytes")
            if member.isreg() and member.name.endswith(".tar"):
                yield PurePosixPath(member.name).name, member.offset_data, member.size
        # A damaged header passes for the end.
        stream.seek(tar.offset)
        if stream.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset}")


class Header(tarfile.TarInfo):
    """A member's header; one that would make tarfile read without end is refused."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        """The header in a block of 512 bytes."""
        header = super().frombuf(buf, encoding, errors)
        extended = header.type in EXTENDED_TYPES
        if header.size < 0 or (extended and header.size > EXTENDED_BYTES):
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


def _check_member(member: tarfile.TarInfo, name: str) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\x00" in member.name:
        problem = "has a path that leads outside"
    elif member.issym() or member.islnk():
        problem = "is a link"
    elif member.issparse() or not (member.isreg() or member.isdir()):
        problem = "is a device or another special file"
    else:
        return
    raise DataError(f"{name}: member {member.name!r} {problem}; the shard is refused as a whole")


def _distinct(members: Iterator[dict[str, Any]], refused: list[Refused]) -> Iterator[dict[str, Any]]:
    """Without members of a name that the sample under way has already (webdataset's grouping would raise)."""
    last_key, extensions = "", set[str]()
    for member in members:
        key, extension = _key_and_extension(member["fname"])
        if key != last_key:
            last_key, extensions = key, set()
        if extension in extensions:
            refused.append(Refused(key, f"two members named .{extension} in its shard"))
            continue
        extensions.add(extension)
        yield member


def _sample(key: str, group: dict[str, Any]) -> RawSample | Refused:
    over = next((data for data in group.values() if isinstance(data, Refused)), None)
    if over is not None:
        return over
    picture = next((group[e] for e in IMAGE_EXTENSIONS if e in group), None)
    if picture is None:
        return Refused(key, "no picture among its members")
    try:
        fields = foreign_json(group["json"]) if "json" in group else {}
    except ValueError:
        return Refused(key, "its json cannot be read")
    if not isinstance(fields, dict):
        return Refused(key, "its json is not an object")
    if fields.get("status") not in (None, "success"):
        return Refused(key, f"its status is {fields['status']!r}")
    text = next((group[e] for e in CAPTION_EXTENSIONS if e in group), None)
    caption = text.decode("utf-8", errors="replace") if text is not None else fields.get("caption")
    return RawSample(key, picture, caption if isinstance(caption, str) else None, plain_values(fields))


class _Watched:
    """A stream that remembers how much has been read, and where the last byte stood that is not zero.

    Its end is told once. `tarfile` goes to a place ahead by reading, and does not stop at the end.
    """

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.position = 0
        self.content_end = 0
        self.ended = False

    def read(self, size: int = -1) -> bytes:
        if self.ended:
            raise tarfile.ReadError("unexpected end of data")
        data = self.stream.read(size)
        self.ended = not data
        content = len(data.rstrip(b"\0"))
        if content:
            self.content_end = self.position + content
        self.position += len(data)
        return data

    def ends_at(self, offset: int) -> bool:
        """Whether an end mark (two blocks of zeros) stands at `offset`, and nothing after it; reads the rest.

        `tarfile` itself takes a damaged header in the middle of a tar, or the end of the file, for the end.
        """
        while not self.ended:
            self.read(1 << 20)
        return self.content_end <= offset and self.position >= offset + 2 * tarfile.BLOCKSIZE
