"""Files, local or `s3://` (by s3fs; keys come from where AWS tools keep them, and are said nowhere)."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import IO, Annotated, Any, NamedTuple, TypeGuard, cast

from pydantic import AfterValidator

from foundation.errors import DataError, ExitCode, UserError

# Of a request that fails: with pauses that double up to 20 s, this outlasts a server's restart.
ATTEMPTS = 10
CHANGED_MEANWHILE = "changed while it was read; leave it as it is"
_STRETCHES, _STRETCH_BYTES = 16, 1 << 16  # of a file, to know it by
_NO_CONTENT = "__MACOSX"  # a folder that Apple's archiver adds: shadows of the files beside it
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)


class NoSuchFile(DataError):
    """There is no file of that name."""


class StoreUnreachable(UserError):
    """The object store does not answer, or does not let us in; the same command goes on once it does."""

    exit_code = ExitCode.REQUEUE


def _local(path: str) -> str:
    if "://" in path:
        raise ValueError(f"{path} is no local path, and only a local one works here")
    return path


def _address(text: str) -> str:
    scheme, slashes, rest = text.partition("://")
    if (not slashes and not os.path.isabs(text)) or (slashes and not rest):
        raise ValueError(f"{text!r} is no address: expected s3://bucket/prefix, or an absolute path")
    if slashes:
        from fsspec.registry import known_implementations

        if scheme not in known_implementations:
            raise ValueError(f"{text}: {scheme}:// is not known; expected for example s3://bucket/prefix")
        package = known_implementations[scheme]["class"].split(".")[0]
        if find_spec(package) is None:
            raise ValueError(f"{text}: {scheme}:// needs the package {package}, which is not installed")
    return text


LocalPath = Annotated[str, AfterValidator(_local)]  # in recipes: where no address of an object store will do
StoreAddress = Annotated[str, AfterValidator(_address)]  # in recipes: a place for files, of any kind of store


@contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading.

    Raises:
        NoSuchFile: there is none.
        DataError: on S3 it was replaced since it was listed.
    """
    try:
        if is_remote(path):
            with reaching(path), remote_files().open(path, "rb") as stream:
                # Which bounds the length of a line; s3fs's own stream does not.
                yield cast(IO[bytes], io.BufferedReader(stream))
        else:
            with open(path, "rb") as stream:
                yield stream
    except (FileNotFoundError, NotADirectoryError):
        raise NoSuchFile(f"{path} does not exist") from None


def matching_files(pattern: str, suffix: str) -> dict[str, int]:
    """Path -> bytes of the files that a path or glob stands for; of a folder those with `suffix`, and of a
    local glob, too, if it matches any."""
    if is_remote(pattern):
        pattern = pattern if pattern.endswith(suffix) else f"{pattern.rstrip('/')}/*{suffix}"
        with reaching(pattern):
            details = remote_files().glob(pattern, detail=True)
        return {f"s3://{path}": int(info["size"]) for path, info in details.items()}
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), f"*{suffix}")
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    wanted = [path for path in found if path.endswith(suffix)]
    return {path: os.path.getsize(path) for path in wanted or found}


class FileState(NamedTuple):
    """What a look at a local file tells that does not open it: bytes, and times in ns since 1970."""

    size: int
    content_changed: int
    entry_changed: int


def file_state(path: str) -> FileState | None:
    """The state of a local file; None where there is none, or no file."""
    try:
        found = os.stat(path)
    except ValueError:  # a NUL is in no name
        return None
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def file_version(path: str, begin: int = 0, size: int | None = None) -> str:
    """What tells a file from one that has taken its place: its size, and a hash or its entity tag.

    A copy, or a file that was only touched, is the same. Of a file above 1 MiB the hash is of sixteen even
    stretches, first and last bytes among them: tables may have hundreds of gigabytes.

    Args:
        path: of the file.
        begin: first byte of a part of the file, to know that by, as far as it is local.
        size: of the part; None up to the end.

    Raises:
        DataError: there is none, or it may not be read.
    """
    try:
        if not is_remote(path):
            return _content_version(path, begin, size)
        with reaching(path):
            found = remote_files().info(path)
        return f"{found['size']} {found['ETag']}"
    except FileNotFoundError:
        raise NoSuchFile(f"{path} does not exist") from None
    except PermissionError as error:
        raise DataError(not_permitted(path, error)) from None


def not_permitted(path: str, error: PermissionError) -> str:
    """What is said of a file of the input that may not be read; where the work goes is another matter."""
    return f"{error.filename or path} cannot be read: {error.strerror}; give rights to read it"


def _content_version(path: str, begin: int, size: int | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size is None:
            size = os.fstat(file.fileno()).st_size - begin
        gaps, spread = _STRETCHES - 1, max(0, size - _STRETCH_BYTES)
        for place in sorted({spread * number // gaps for number in range(_STRETCHES)}):
            file.seek(begin + place)
            digest.update(file.read(min(_STRETCH_BYTES, size - place)))
    return f"{size} {digest.hexdigest()[:16]}"


def matching_folders(pattern: str) -> list[str]:
    """The folders that a path or glob stands for, sorted."""
    if is_remote(pattern):
        with reaching(pattern):
            found = remote_files().glob(pattern.rstrip("/"))
            return [f"s3://{path}" for path in sorted(found) if remote_files().isdir(path)]
    if os.path.isdir(pattern):
        return [pattern]
    return [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isdir(path)]


def forget_listings(patterns: Iterable[str]) -> None:
    """What is listed next is what is there now, on S3 as well."""
    if any(map(is_remote, patterns)):
        remote_files().invalidate_cache()


def files_below(folder: str) -> dict[str, tuple[int, str]]:
    """Path relative to the folder -> bytes and entity tag ("" of a local file), of all files below it, sorted
    by path.

    What begins with a dot is left out, and what Apple's archiver has added.

    Raises:
        PermissionError: some folder may not be looked into; without it, its files would be missed unseen.
    """
    if is_remote(folder):
        root = folder.removeprefix("s3://").rstrip("/") + "/"
        with reaching(folder):
            found = remote_files().find(folder, detail=True)
        listed = {path.removeprefix(root): info for path, info in sorted(found.items())}
        return {
            name: (int(info["size"]), str(info["ETag"]))
            for name, info in listed.items()
            if not any(map(_is_hidden, name.split("/")))
        }
    sizes = {}
    for place, folders, names in os.walk(folder, onerror=_unless_gone):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in names:
            path = os.path.join(place, name)
            # A link may lead anywhere: only what really lies in the folder is its content.
            if not _is_hidden(name) and not os.path.islink(path) and (state := file_state(path)):
                sizes[os.path.relpath(path, folder)] = (state.size, "")
    return dict(sorted(sizes.items()))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _NO_CONTENT


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return os.path.exists(path)
    with reaching(path):
        try:
            # s3fs's own `exists` takes a store that lets nobody in for an empty one.
            remote_files().info(path)
        except FileNotFoundError:
            return False
    return True


def is_remote(path: str) -> bool:
    """Whether a path is an `s3://` address."""
    return path.startswith("s3://")


def remote_files(listings_cached: bool = True) -> Any:
    """The S3 file system; made anew in each process, since it does not survive a fork.

    Args:
        listings_cached: for input, which does not change; what others write meanwhile is not seen.
    """
    import fsspec

    config = {"retries": {"mode": "standard", "max_attempts": ATTEMPTS}}
    return fsspec.filesystem("s3", use_listings_cache=listings_cached, config_kwargs=config)


def fails_for_a_while(error: Exception) -> TypeGuard[OSError]:
    """Whether a file system of a network, or a disk that goes, says that it fails: not the data's fault."""
    return isinstance(error, OSError) and error.errno in _PASSING


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turns what clients raise where the store cannot be reached, or fails, into StoreUnreachable; and where
    a file is not the listed one any more, into DataError.

    That there is no such file, or that it is there already, is an answer and passes, as does what the local
    disk says. Around a local path it does nothing: its errors are those of its disk.

    The client's own words are left out: they may quote a request with its signature.
    """
    if not is_remote(address):
        yield
        return
    from botocore.exceptions import BotoCoreError
    from s3fs.utils import FileExpired

    try:
        yield
    except FileExpired:
        raise DataError(f"{address} {CHANGED_MEANWHILE}") from None
    except (BotoCoreError, OSError) as error:
        if isinstance(error, OSError) and not _is_the_stores(error):
            raise
        raise StoreUnreachable(
            f"{address} cannot be reached ({_kind(error)}), after {ATTEMPTS} attempts; look at its "
            "address and your keys. The same command goes on from here"
        ) from None


def _is_the_stores(error: OSError) -> bool:
    """Whether an error is a store's that fails (SlowDown, 500, 502 ...) or lets nobody in."""
    from botocore.exceptions import ClientError

    if isinstance(error, FileNotFoundError | FileExistsError):
        return False
    # s3fs translates the store's answer, and keeps it as the cause. The disk's and pyarrow's have none.
    translated = isinstance(error.__cause__, ClientError)
    return translated or isinstance(error, PermissionError | ConnectionError | TimeoutError)


def _kind(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return type(error).__name__ if number is None else errno.errorcode.get(number, str(number))
