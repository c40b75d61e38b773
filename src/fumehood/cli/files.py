"""Files across the boundary. What comes out is hostile in name, kind, size and content (H12)."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fumehood.errors import FileFault, InvalidInput, NotFound
from fumehood.model import GIB

if TYPE_CHECKING:
    from fumehood.client.sandbox import AsyncSandbox

HOME = "/home/user"
MAX_OUT_FILES = 1_000
MAX_OUT_BYTES = 1 * GIB  # in all; a sparse file may claim 8 EiB
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Unsafe(ValueError):
    """A guest's name that must not become a host path."""


def report(skipped: Iterable[str]) -> None:
    for line in skipped:
        print(f"note: {line}", file=sys.stderr)


async def copy_in(box: AsyncSandbox, path: Path) -> list[str]:
    """Copy a file, or a directory with all in it, into the home. Returns what was skipped and why."""
    root = _existing(path)
    skipped: list[str] = []
    for source in _tree(root):
        # A link in the user's tree may point at what they never meant to hand over, such as a key.
        if source.is_symlink() or not (source.is_file() or source.is_dir()):
            skipped.append(f"not copied in: {source}: neither a plain file nor a directory")
            continue
        target = f"{HOME}/{source.relative_to(root.parent).as_posix()}"
        if source.is_dir():
            await box.files.mkdir(target)
        else:
            await box.files.upload(source, target)
    return skipped


def _existing(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except OSError as e:
        raise InvalidInput(f"can't copy in {path}", cause=str(e), remediation="name a file or directory here") from None


def _tree(root: Path) -> Iterator[Path]:
    yield root
    for folder, directories, names in os.walk(root, followlinks=False):
        yield from (Path(folder, name) for name in sorted(directories) + sorted(names))


async def copy_out(box: AsyncSandbox, paths: Iterable[str], out: Path) -> list[str]:
    """Copy plain files of the home under `out`. Returns what was refused and why."""
    refused: list[str] = []
    left = MAX_OUT_BYTES
    for number, path in enumerate(paths):
        if number >= MAX_OUT_FILES:
            return [*refused, f"only the first {MAX_OUT_FILES} files were copied out"]
        try:
            parts = safe_parts(path)
            data = await _plain_file(box, path, left)
            write_plain(out, parts, data)
            left -= len(data)
        except (Unsafe, FileFault, InvalidInput, NotFound, OSError) as e:  # any may come of a file that changed since stat()
            refused.append(f"not copied out: {path[:200]!r}: {e}")
    return refused


async def _plain_file(box: AsyncSandbox, path: str, limit: int) -> bytes:
    entry = await box.files.stat(path)
    if entry.type != "file":
        raise Unsafe(f"a {entry.type}, not a plain file")
    if entry.size > limit:
        raise Unsafe(f"{entry.size} bytes are over the {limit} left of {MAX_OUT_BYTES}")
    return await box.files.read(path, limit_bytes=limit)


def safe_parts(path: str) -> tuple[str, ...]:
    """The components of a guest path below its home. Raises Unsafe for any that the host should not create."""
    pure = PurePosixPath(path)
    if "\0" in path or len(path) > 4096 or ".." in pure.parts:
        raise Unsafe("the name leaves its directory")
    if not pure.is_relative_to(HOME) or pure == PurePosixPath(HOME):
        raise Unsafe(f"not under {HOME}")
    parts = tuple(_clean(part) for part in pure.relative_to(HOME).parts)
    # .git/hooks, .envrc, .bashrc: a name alone can make a host tool run the content.
    if any(part.startswith(".") for part in parts):
        raise Unsafe("hidden names are not copied out")
    return parts


def _clean(part: str) -> str:
    text = "".join(c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF else "_" for c in part)
    if len(text.encode()) > 255:
        raise Unsafe("a component is over 255 bytes")
    return text


def prepare(out: Path) -> None:
    """Make the directory before the program runs. Raises InvalidInput: an hour's results must not be lost for a typo."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InvalidInput(f"can't make the directory {out}", cause=str(e), remediation="name one you may write") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InvalidInput(f"can't write into {out}", remediation="name a directory you may write")


def write_plain(out: Path, parts: tuple[str, ...], data: bytes) -> None:
    """Write a plain file, mode 0644, under `out`; below `out` no link is followed and nothing is opened that exists."""
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # `out` is the user's own word: may be a link
    try:
        for part in parts[:-1]:
            folder = _descend(folder, part)
        _replace(folder, parts[-1], data)
    finally:
        os.close(folder)


def _descend(folder: int, part: str) -> int:
    with suppress(FileExistsError):
        os.mkdir(part, 0o755, dir_fd=folder)
    below = os.open(part, _DIRECTORY, dir_fd=folder)
    os.close(folder)
    return below


def _replace(folder: int, name: str, data: bytes) -> None:
    # A new file, then rename: opening an existing name could follow a link or hang on a fifo.
    temporary = f".fumehood-{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise
