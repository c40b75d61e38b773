"""Files across the boundary. What comes out is hostile in name, kind, size and content (H12)."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
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
    root = existing(path)
    return await put(box, root, f"{HOME}/{root.name}")


async def put(box: AsyncSandbox, root: Path, target: str, on_file: Callable[[Path], object] = lambda _: None) -> list[str]:
    """Copy `root` as `target`, with all in it if it is a directory. Returns what was skipped and why."""
    skipped: list[str] = []
    for source in tree(root):
        # A link in the user's tree may point at what they never meant to hand over, such as a key.
        if source.is_symlink() or not (source.is_file() or source.is_dir()):
            skipped.append(f"not copied in: {source}: neither a plain file nor a directory")
            continue
        inside = str(PurePosixPath(target, source.relative_to(root)))
        if source.is_dir():
            await _directory(box, inside)
        else:
            await box.files.upload(source, inside)
            on_file(source)
    return skipped


async def _directory(box: AsyncSandbox, path: str) -> None:
    try:
        await box.files.mkdir(path)
    except FileFault as e:
        if e.details.get("errno") != "EEXIST" or (await box.files.stat(path)).type != "directory":
            raise


def existing(path: Path) -> Path:
    """Resolved. Raises InvalidInput when there is no such file here."""
    try:
        return path.resolve(strict=True)
    except OSError as e:
        raise InvalidInput(f"can't copy in {path}", cause=str(e), remediation="name a file or directory here") from None


def tree(root: Path) -> Iterator[Path]:
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


def safe_parts(path: str, root: str = HOME) -> tuple[str, ...]:
    """The components of a guest path below `root`. Raises Unsafe for any that the host should not create."""
    pure = PurePosixPath(path)
    if "\0" in path or len(path) > 4096 or ".." in pure.parts:
        raise Unsafe("the name leaves its directory")
    if not pure.is_relative_to(root) or pure == PurePosixPath(root):
        raise Unsafe(f"not under {root}")
    parts = tuple(clean(part) for part in pure.relative_to(root).parts)
    # .git/hooks, .envrc, .bashrc: a name alone can make a host tool run the content.
    if any(part.startswith(".") for part in parts):
        raise Unsafe("hidden names are not copied out")
    return parts


def clean(part: str) -> str:
    """One component without control characters. Raises Unsafe when it is too long for a file system."""
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
    with _below(out, parts[:-1]) as folder:
        _replace(folder, parts[-1], data)


def place(out: Path, parts: tuple[str, ...], staged: Path) -> None:
    """The same for a file that was staged on the same file system."""
    with _below(out, parts[:-1]) as folder:
        os.rename(staged, parts[-1], dst_dir_fd=folder)


def make_directory(out: Path, parts: tuple[str, ...]) -> None:
    with _below(out, parts):
        return


@contextmanager
def _below(out: Path, parts: tuple[str, ...]) -> Generator[int]:
    """A descriptor of the directory, made where it is missing."""
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # `out` is the user's own word: may be a link
    try:
        for part in parts:
            folder = _descend(folder, part)
        yield folder
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
