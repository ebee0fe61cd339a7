"""Files of a remote dataset on local disk: fetched once, verified, and given up when space runs out.

The transport and the hashes are mosaicml-streaming's. Its own cache keeps its books in shared memory, which a
killed job leaves behind; here the file system is the book. A file appears under its name only after its
size and hash were checked, by a rename; locks are the kernel's and vanish with their process. So any number
of processes on a node may share a cache, and any of them may be killed at any moment. What is under way has a
folder of its own, with a hole as long as what will come: whoever makes room at the same time counts it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from data_pipeline.ingest.storage import StoreUnreachable
from data_pipeline.store import PlaceUnusable, writing_to
from data_pipeline.streaming_import import CloudDownloader, get_hash, get_hashes
from foundation.errors import DataError
from foundation.partials import PARTIAL_SUFFIX, partial_path, sweep_abandoned

_ATTEMPTS = 6  # with pauses of 1, 2, 4, 8 and 16 s between them: longer than a store's usual restart
_TIMEOUT = 120.0  # seconds for an answer
_LOCKS = 64  # files that locks are spread over
_KEEP = 0.9  # share of their room that shards keep when one has to go, so that not every fetch has to evict
_RESERVED = "reserved"


class ShardCache:
    """A folder that holds copies of files under a remote prefix. Safe among threads and processes."""

    def __init__(self, remote: str, folder: Path, limit: int | None = None):
        """
        Args:
            remote: where the files come from: `s3://bucket/prefix`, or a local folder.
            folder: where the copies go; made if missing.
            limit: bytes that the copies may take together, those under way included; None: no limit. Shards
                go to keep it, other files stay: at least as much as those, and twice the largest shard.
        """
        self.remote, self.folder, self.limit = remote.rstrip("/"), folder, limit
        self._local = threading.local()
        (folder / "files").mkdir(parents=True, exist_ok=True)
        (folder / "locks").mkdir(exist_ok=True)
        sweep_abandoned((folder / "files").glob(f"*{PARTIAL_SUFFIX}"))

    def fetch(self, name: str, size: int | None = None, hashes: Mapping[str, str] | None = None) -> Path:
        """The local copy of a file, fetched if it is not there.

        Another process may evict it at any time: open it right away, and fetch again where that fails.

        Args:
            name: path relative to the remote prefix.
            size: its bytes; None: unknown, fetched anew and not checked.
            hashes: algorithm -> hex digest; one that is known here is checked.

        Raises:
            DataError: it is not there, or is not what it should be, after several attempts.
            PlaceUnusable: the cache's disk is full.
            StoreUnreachable: the store does not answer, after several attempts, or does not let us in.
        """
        # Named by its content: a dataset that was made anew under the same address does not meet its old
        # copies.
        digest = hashlib.sha256(f"{name} {size} {sorted((hashes or {}).items())}".encode()).hexdigest()
        path = self.folder / "files" / f"{digest[:32]}-{PurePosixPath(name).name}"
        if size is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # for the next eviction: used now
                if _has_bytes(path, size):
                    return path
        with self._lock(f"file-{zlib.crc32(name.encode()) % _LOCKS}"):
            if size is None or not _has_bytes(path, size):  # else another process fetched it meanwhile
                with self._working_folder(path, size or 0) as working:
                    self._download(f"{self.remote}/{name}", working / "file", path, size, hashes or {})
        return path

    def _download(
        self, source: str, partial: Path, path: Path, size: int | None, hashes: Mapping[str, str]
    ) -> None:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            partial.unlink(missing_ok=True)  # the downloader would take it as done
            problem, failure = "", ""
            try:
                with writing_to(self.folder):
                    self._downloader().download(source, str(partial), _TIMEOUT)
                    problem = _difference(partial, size, hashes)
                    if not problem:
                        _move_written(partial, path)
                        return
            except PlaceUnusable:
                raise
            except Exception as error:  # noqa: BLE001  (each store's client has errors of its own)
                if _is_missing(error):
                    raise DataError(f"{source} cannot be read: there is no such file") from None
                failure = type(error).__name__  # its words may quote a request with its signature
                if _code(error) == "403":
                    break
        if failure:
            raise StoreUnreachable(
                f"{source} cannot be reached ({failure}); look at its address and your keys. "
                "The same command goes on from here"
            )
        raise DataError(f"{source} cannot be read: {problem}")

    def _downloader(self) -> CloudDownloader:
        """One client for each thread and process: making clients is not thread-safe, sharing sockets not
        fork-safe."""
        owner = (os.getpid(), threading.get_ident())
        if getattr(self._local, "owner", None) != owner:
            remote = self.remote if "://" in self.remote else None
            self._local.owner, self._local.client = owner, CloudDownloader.get(remote)
        return self._local.client

    @contextlib.contextmanager
    def _working_folder(self, path: Path, size: int) -> Iterator[Path]:
        """A folder to fetch a file of `size` bytes into, for which there is room."""
        working = partial_path(path)
        try:
            with writing_to(self.folder), self._lock("evict"):
                if self.limit is not None:
                    self._make_room(self.limit - size)
                working.mkdir()
                with open(working / _RESERVED, "wb") as reserved:
                    reserved.truncate(size)  # takes nothing of the disk
            yield working
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def _make_room(self, limit: int) -> None:
        """Evict the shards that were not used for longest, so that all copies stay within `limit` bytes."""
        shards, others = list[tuple[int, int, Path]](), 0
        for path in (self.folder / "files").iterdir():
            under_way = path.suffix == PARTIAL_SUFFIX
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found = (path / _RESERVED if under_way else path).stat()
                if path.suffix == ".mds":
                    shards.append((found.st_mtime_ns, found.st_size, path))
                else:
                    others += found.st_size
        used, room = sum(held for _, held, _ in shards), limit - others
        if used <= room:
            return
        for _, freed, path in sorted(shards):
            if used <= _KEEP * room:
                break
            path.unlink(missing_ok=True)  # whoever reads it has it open, and goes on reading
            used -= freed

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.folder / "locks" / name, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def _difference(path: Path, size: int | None, hashes: Mapping[str, str]) -> str:
    """How a fetched file differs from what it should be; "" where it does not."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"it has {found} bytes, expected {size}"
    for algorithm in sorted(hashes.keys() & get_hashes()):
        if get_hash(algorithm, path.read_bytes()) != hashes[algorithm]:
            return f"its {algorithm} is not {hashes[algorithm]}"
    return ""


def _has_bytes(path: Path, size: int) -> bool:
    """Whether a copy is there, and not cut by whatever befell the disk."""
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _move_written(partial: Path, path: Path) -> None:
    """A rename that outlives the machine's power: else the name may come back without the bytes."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _is_missing(error: Exception) -> bool:
    """Whether the store has said that there is no such file: asking again will not help."""
    return isinstance(error, FileNotFoundError) or _code(error) in ("404", "NoSuchKey", "NoSuchBucket")


def _code(error: Exception) -> str | None:
    """What the store has answered."""
    response = getattr(error, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code
