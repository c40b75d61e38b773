"""Published directories: state_dir/microvm/KIND/NAME with the files of a kernel, an image or a snapshot, and a manifest.json.

A directory appears whole or not at all, is never changed afterwards, and is replaced in one step. Who uses an old one goes on
with its open files. What was damaged since is noticed by size, time, inode or digest before a guest is started from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fumehood.errors import CapacityExceeded, InvalidInput, SetupFailed
from fumehood.runtime.microvm.removal import remove

FORMAT = 1
MANIFEST = "manifest.json"
RESERVE_BYTES = 256 << 20  # stays free whatever is made: a full disk stops more than microVMs
_MAKE_WITH = {
    "kernels": "fumehood image kernel --profile {name}",
    "images": "fumehood image build {name}, or for all that it takes: fumehood image prepare TIER --template {name}",
    "snapshots": "rm -r {directory}: it is made again when it is next needed",
}
KINDS = tuple(_MAKE_WITH)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_UNFINISHED = ".making-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Stamp:
    """How a file that had `sha256` looked: while it looks the same, it is not read again."""

    sha256: str
    size_bytes: int
    inode: int
    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    kind: str
    name: str
    directory: Path
    files: Mapping[str, Stamp]
    facts: Facts = field(default_factory=dict[str, Any])

    def path(self, file: str) -> Path:
        """Raises SetupFailed when this asset has no such file."""
        if file not in self.files:
            raise _unusable(self.kind, self.name, self.directory, f"it has no {file!r}")
        return self.directory / file

    @property
    def digest(self) -> str:
        """Of all its files: what a snapshot that was made from it remembers."""
        return hashlib.sha256(json.dumps({n: s.sha256 for n, s in self.files.items()}, sort_keys=True).encode()).hexdigest()


class Assets:
    """All methods block on the disk. `state_dir` is Config.state_dir."""

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "microvm"

    def directory(self, kind: str, name: str) -> Path:
        """Raises InvalidInput for an unknown kind and for a name that is not lower case, digits, `._-`."""
        if kind not in KINDS or not _NAME.fullmatch(name):
            raise InvalidInput(f"no asset {kind}/{name}", cause=f"kinds: {', '.join(KINDS)}; names match {_NAME.pattern}")
        return self._root / kind / name

    def publish(
        self, kind: str, name: str, make: Callable[[Path], Facts], need_bytes: int = 0, known: Iterable[Manifest] = ()
    ) -> Manifest:
        """`make` fills the empty directory that it is given and returns the facts. Replaces what had that name. Hard links to
        files of `known` are not read again.

        Raises CapacityExceeded when the disk has less than `need_bytes` and a reserve, or fills up meanwhile, and what `make`
        raises; nothing is left of it then.
        """
        target = self.directory(kind, name)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(target.parent)
        check_space(target.parent, need_bytes)
        with _unfinished(target.parent) as made, _full_disk(name):
            facts = make(made)
            seen = {(s.inode, s.size_bytes, s.mtime_ns): s for manifest in known for s in manifest.files.values()}
            files = {p.relative_to(made).as_posix(): _stamp(p, seen) for p in sorted(made.rglob("*")) if p.is_file()}
            manifest = Manifest(kind, name, target, files, facts)
            (made / MANIFEST).write_text(_to_json(manifest))
            for path in (*made.rglob("*"), made):
                _sync(path)
            _put_in_place(made, target)
            _sync(target.parent)
        return manifest

    def load(self, kind: str, name: str, *, thorough: bool = False) -> Manifest:
        """Checked. `thorough` reads every file, else only those that do not look as they did when they were published.

        Raises SetupFailed, which says what to run, for one that is missing, damaged or of another format.
        """
        directory = self.directory(kind, name)
        manifest = _read(kind, name, directory)
        for file, stamp in manifest.files.items():
            if fault := _fault(directory / file, stamp, thorough):
                raise _unusable(kind, name, directory, f"{file} {fault}")
        return manifest

    def all(self, kind: str) -> Iterator[Manifest | SetupFailed]:
        """Each asset of a kind by name, or what is wrong with it."""
        parent = self.directory(kind, "any").parent
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            if not path.name.startswith("."):
                try:
                    yield self.load(kind, path.name)
                except SetupFailed as e:
                    yield e

    def remove(self, kind: str, name: str) -> None:
        """Does nothing when there is none."""
        target = self.directory(kind, name)
        with contextlib.suppress(FileNotFoundError), _unfinished(target.parent) as aside:
            os.rename(target, aside / "old")


def _unusable(kind: str, name: str, directory: Path, cause: str) -> SetupFailed:
    how = _MAKE_WITH[kind].format(name=name, directory=directory)
    what = f"the microVM {kind.removesuffix('s')} {name!r} can't be used"
    return SetupFailed(what, cause=cause, remediation=f"run: {how}", name=name)


def check_space(directory: Path, need_bytes: int) -> None:
    """Raises CapacityExceeded when the disk has less than that and a reserve."""
    free = shutil.disk_usage(directory).free
    if free < need_bytes + RESERVE_BYTES:
        raise CapacityExceeded(
            f"not enough space in {directory}",
            cause=f"{free >> 20} MiB are free, {need_bytes >> 20} are needed and {RESERVE_BYTES >> 20} stay free",
            remediation="make room, or set state_dir to another disk",
        )


@contextlib.contextmanager
def _full_disk(name: str) -> Generator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CapacityExceeded(f"{name} was not made", cause=str(e), remediation="make room on the disk") from None


@contextlib.contextmanager
def _unfinished(parent: Path) -> Generator[Path]:
    """A directory that goes away at the end, or, should we die, at the next publish: its lock tells."""
    made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
    lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):
            remove(made)


def _sweep(parent: Path) -> None:
    for left in parent.glob(_UNFINISHED + "*"):
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(BlockingIOError):  # somebody is making it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(left)
            os.close(lock)


def _put_in_place(made: Path, target: Path) -> None:
    """Swaps with what was there, so that no moment has neither; that goes with the temporary name."""
    if not target.exists():
        os.rename(made, target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(made), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), f"renaming {made} to {target}: {os.strerror(ctypes.get_errno())}")


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path, seen: Mapping[tuple[int, int, int], Stamp]) -> Stamp:
    s = path.stat()
    return seen.get((s.st_ino, s.st_size, s.st_mtime_ns)) or Stamp(sha256(path), s.st_size, s.st_ino, s.st_mtime_ns)


def _fault(path: Path, stamp: Stamp, thorough: bool) -> str:
    try:
        s = path.stat()
        if s.st_size != stamp.size_bytes:
            return f"has {s.st_size} bytes of {stamp.size_bytes}"
        known = (s.st_ino, s.st_mtime_ns) == (stamp.inode, stamp.mtime_ns)
        return "" if (known and not thorough) or sha256(path) == stamp.sha256 else "is damaged: its digest is another"
    except OSError as e:
        return f"can't be read: {e.strerror}"


def _to_json(m: Manifest) -> str:
    files = {name: vars(stamp) for name, stamp in m.files.items()}
    return json.dumps({"format": FORMAT, "kind": m.kind, "name": m.name, "files": files, "facts": m.facts}, indent=1)


def _read(kind: str, name: str, directory: Path) -> Manifest:
    try:
        value = cast("dict[str, Any]", json.loads((directory / MANIFEST).read_text()))
        if value["format"] != FORMAT:
            raise _unusable(kind, name, directory, f"it has format {value['format']}, this version reads {FORMAT}")
        if (value["kind"], value["name"]) != (kind, name):
            raise _unusable(kind, name, directory, f"its manifest is that of {value['kind']}/{value['name']}")
        files = {file: Stamp(**stamp) for file, stamp in value["files"].items()}
        return Manifest(kind, name, directory, files, value["facts"])
    except FileNotFoundError:
        raise _unusable(kind, name, directory, "it has not been made here") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _unusable(kind, name, directory, f"its manifest can't be read: {e!r:.200}") from None
