"""Clients' files on disk, below one folder: uploads and what batches write. Owns ids, paths, limits, and that what is there survives a crash.

`files/ID` is a file's content and `files/ID.json` what is known of it, written last: content without it is an upload that was cut off, and goes at
the next start. Paths are made of our own ids only. Lines that batches append are here too (`Lines`). Routes are files.py's.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from miniinfer.config import ConfigError, ServerConfig
from miniinfer.serve.protocol import ApiError

MAX_FILES = 10_000  # of one client
LARGEST = 50  # files of the largest size that one client may have

T = TypeVar("T")


class Entry(msgspec.Struct):
    """A file, as the API shows it, and whose it is."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    owner: str
    expires_at: int | None = None


class Store:
    """All files. Without a folder of the user's they are in a private one, until the process ends."""

    def __init__(self, config: ServerConfig) -> None:
        self.entries: dict[str, Entry] = {}  # in the order of their creation
        self.needed: Counter[str] = Counter()  # ids of files that must not go now, and for how many that is so
        self._folder = config.files_dir
        self.max_file, self._max_all = config.max_file_mib << 20, LARGEST * config.max_file_mib << 20
        self._used: Counter[str] = Counter()  # bytes by client, uploads that are still coming among them
        if self._folder is not None:
            found = [read(Entry, path) for path in self.root.glob("files/*.json")]
            for entry in sorted(found, key=lambda entry: (entry.created_at, entry.id)):
                if self.path(entry.id).exists():
                    self._add(entry)

    @cached_property
    def root(self) -> Path:
        """The folder, ours alone for as long as the process lives. ConfigError if it cannot be had."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="miniinfer-files-", ignore_cleanup_errors=True)
            root = Path(self._temporary.name)
        else:
            root = Path(self._folder).expanduser().absolute()
        try:
            for folder in (root, root / "files", root / "batches"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock(root / "lock")
        except BlockingIOError:
            raise ConfigError(f"files_dir: {root} is in use by another server; every server needs its own") from None
        except OSError as e:
            raise ConfigError(f"files_dir: cannot use {root} ({e.strerror})") from None
        return root

    def close(self) -> None:
        """Lets go of the folder; a temporary one is removed. Nothing of the store may be used after."""
        if "root" in self.__dict__:
            self._lock.close()
            if self._folder is None:
                self._temporary.cleanup()

    def tidy(self, used: Iterable[str]) -> None:
        """Removes what a crash has left: contents that are nobody's, but for those being written (`used`)."""
        known = {*self.entries, *used}
        for path in self.root.glob("files/*"):
            if path.name.removesuffix(".json") not in known:
                path.unlink(missing_ok=True)

    def path(self, id: str) -> Path:
        """Of an id that we have made."""
        return self.root / "files" / id

    # ------------------------------------------------------------------------------------------------------ entries

    def find(self, id: str, owner: str) -> Entry | None:
        """The file, if it is this client's."""
        entry = self.entries.get(id)
        if entry is None or entry.owner != owner or self._expired(entry):
            return None
        return entry

    def of(self, owner: str) -> list[Entry]:
        """A client's files, oldest first."""
        return [entry for entry in list(self.entries.values()) if entry.owner == owner and not self._expired(entry)]

    def _expired(self, entry: Entry) -> bool:
        if entry.expires_at is None or entry.expires_at > time.time() or self.needed[entry.id]:
            return False
        self.remove(entry)
        return True

    def remove(self, entry: Entry) -> None:
        """Whoever is reading it reads on."""
        if self.entries.pop(entry.id, None) is not None:
            self._used[entry.owner] -= entry.bytes
            self.path(entry.id + ".json").unlink(missing_ok=True)
            self.path(entry.id).unlink(missing_ok=True)

    async def keep(self, entry: Entry) -> None:
        """Makes a content that is whole on disk a file."""
        await asyncio.to_thread(write, msgspec.json.encode(entry), self.path(entry.id + ".json"))
        self._add(entry)

    def _add(self, entry: Entry) -> None:
        if (before := self.entries.get(entry.id)) is not None:
            self._used[before.owner] -= before.bytes
        self.entries[entry.id] = entry
        self._used[entry.owner] += entry.bytes

    def reserve(self, owner: str, size: int) -> None:
        """Counts bytes that arrive (0: some are going to) or, if less than 0, gives them back. ApiError 413 if the client has too many."""
        self._used[owner] += size
        if size >= 0 and self._used[owner] > self._max_all:
            raise ApiError(413, f"your files have reached {self._max_all >> 20} MiB ({LARGEST} x --max-file-mib); delete some", code="storage_full")


class Upload:
    """A file that is arriving. If the context ends before `done`, nothing of it stays."""

    def __init__(self, store: Store, owner: str) -> None:
        if len(store.of(owner)) >= MAX_FILES:
            raise ApiError(413, f"you have {MAX_FILES} files; delete some", code="storage_full")
        self._store, self._owner, self._size = store, owner, 0
        self._path = store.path(new_id("file-"))

    def __enter__(self) -> Upload:
        self._file = open(self._path, "xb", opener=private)
        return self

    async def add(self, piece: bytes) -> None:
        """The next piece. ApiError 413 if there gets too much."""
        self._size += len(piece)
        self._store.reserve(self._owner, len(piece))
        if self._size > self._store.max_file:
            raise ApiError(413, f"file: is larger than {self._store.max_file >> 20} MiB (--max-file-mib)", param="file")
        await asyncio.to_thread(self._file.write, piece)

    async def done(self, filename: str, purpose: str, expires_at: int | None) -> Entry:
        """The whole file, safe on disk."""
        await asyncio.to_thread(_sync, self._file)
        now = int(time.time())
        entry = Entry(self._path.name, self._size, now, filename, purpose, self._owner, expires_at)
        await self._store.keep(entry)
        return entry

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._store.reserve(self._owner, -self._size)  # a file that is kept is counted as one
        if self._path.name not in self._store.entries:
            self._path.unlink(missing_ok=True)


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


# -------------------------------------------------------------------------------------------------------- on disk


def lock(path: Path) -> FileIO:
    """The file, open to append and ours until it is closed. BlockingIOError if it is another's."""
    file = FileIO(str(path), "ab", opener=private)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def private(path: str, flags: int) -> int:
    """For `open`: a new file is for our user only."""
    return os.open(path, flags, 0o600)


def read(kind: type[T], path: Path) -> T:
    """A record on disk. ConfigError if it is not one."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(f"files_dir: {path} cannot be read: {e}") from None


def write(text: bytes, path: Path) -> None:
    """Replaces a file's content: after a crash either the old or the new is there, whole."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb", opener=private) as file:
        file.write(text)
        _sync(file)
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class Lines:
    """A file of lines that grows. What `add` has returned from is on disk; a line that was being written when a process ended does not count."""

    def __init__(self, path: Path) -> None:
        """BlockingIOError if somebody else has it open."""
        self.path = path
        self._file = lock(path)
        self.size = self._end()

    def _end(self) -> int:
        """Of the last whole line."""
        with open(self.path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - (1 << 16))
                file.seek(start)
                if (at := file.read(end - start).rfind(b"\n")) >= 0:
                    return start + at + 1
                end = start
        return 0

    def __iter__(self) -> Iterator[bytes]:
        left = self.size
        with open(self.path, "rb") as file:
            while left > 0:
                line = file.readline()
                left -= len(line)
                yield line

    def add(self, data: bytes) -> None:
        """Appends whole lines. OSError if the disk takes them no more; none of them is there then."""
        self._file.truncate(self.size)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        self._file.close()
