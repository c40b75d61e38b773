"""`fumehood cp`: files and directories into and out of a sandbox of the server. Names that come out are hostile (H12)."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fumehood.cli import exits, files, reach
from fumehood.cli.reach import JsonOption, KeyOption, UrlOption
from fumehood.errors import FileFault, InvalidInput, NotFound
from fumehood.model import ID_PATTERN, MIB

if TYPE_CHECKING:
    from fumehood.client.files import Entry
    from fumehood.client.sandbox import AsyncSandbox

MAX_FILES, MAX_DEPTH = 10_000, 64
_BIG_BYTES = 8 * MIB  # less is done before a bar could be read


class Inside(NamedTuple):
    sandbox_id: str
    path: str


class Copied(NamedTuple):
    files: int
    skipped: list[str]


def cp(
    source: Annotated[str, typer.Argument(help="A file or directory here, or ID:PATH.")],
    target: Annotated[str, typer.Argument(help="The other side: ID:PATH, or a path here.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Copy between here and a sandbox, into TARGET if that is a directory; exit 1 if something was left out."""

    async def work() -> int:
        there, here, inward = _sides(source, target)
        async with await reach.box(there.sandbox_id, url, api_key) as box:
            copied = await (copy_in(box, here, there.path) if inward else copy_out(box, there.path, here))
        files.report(copied.skipped)
        if as_json:
            exits.print_json({"files": copied.files, "skipped": copied.skipped})
        return 1 if copied.skipped else 0

    exits.drive(work(), as_json=as_json)


def _sides(source: str, target: str) -> tuple[Inside, Path, bool]:
    """(inside, here, whether it goes in). A path here that looks like ID:PATH is written as ./ID:PATH."""
    a, b = _inside(source), _inside(target)
    if (a is None) == (b is None):
        cause = "neither side is ID:PATH" if a is None else "both sides are inside"
        raise InvalidInput("copy between here and one sandbox", cause=cause, remediation="fumehood cp FILE ID:PATH, or back")
    return (b, Path(source), True) if b else (a or Inside("", ""), Path(target), False)


def _inside(text: str) -> Inside | None:
    sandbox_id, colon, path = text.partition(":")
    return Inside(sandbox_id, path or files.HOME) if colon and re.fullmatch(ID_PATTERN, sandbox_id) else None


async def copy_in(box: AsyncSandbox, source: Path, target: str) -> Copied:
    root = files.existing(source)
    if target.endswith("/") or await _is_directory(box, target):
        target = str(PurePosixPath(target, root.name))
    plain = [path for path in files.tree(root) if path.is_file() and not path.is_symlink()]
    with _progress(source.name, sum(path.stat().st_size for path in plain)) as advance:
        skipped = await files.put(box, root, target, lambda path: advance(path.stat().st_size))
    return Copied(len(plain), skipped)


async def _is_directory(box: AsyncSandbox, path: str) -> bool:
    try:
        return (await box.files.stat(path)).type == "directory"
    except (NotFound, FileFault):
        return False


async def copy_out(box: AsyncSandbox, source: str, target: Path) -> Copied:
    top = await box.files.stat(source)
    if target.is_dir():
        target = target / files.clean(top.name)
    elif not target.parent.is_dir():
        raise InvalidInput(f"no directory {target.parent}", remediation="make it first")
    if top.type == "directory":
        files.prepare(target)
        return await _tree_out(box, top.path, target)
    with _progress(top.name, top.size) as advance:
        refused = await _files_out(box, [top], lambda _: (target.parent, (target.name,)), advance)
    return Copied(1 - len(refused), refused)


async def _tree_out(box: AsyncSandbox, root: str, out: Path) -> Copied:
    entries = await box.files.list(root, depth=MAX_DEPTH)
    refused: list[str] = []
    for entry in entries:
        if entry.type == "directory":
            try:
                files.make_directory(out, files.safe_parts(entry.path, root))
            except (files.Unsafe, OSError) as e:
                refused.append(f"not copied out: {entry.path[:200]!r}: {e}")
    rest = [entry for entry in entries if entry.type != "directory"]
    with _progress(root, sum(entry.size for entry in rest)) as advance:
        failed = await _files_out(box, rest, lambda entry: (out, files.safe_parts(entry.path, root)), advance)
    return Copied(len(rest) - len(failed), refused + failed)


_Where = Callable[["Entry"], tuple[Path, tuple[str, ...]]]


async def _files_out(box: AsyncSandbox, entries: list[Entry], where: _Where, advance: Callable[[int], object]) -> list[str]:
    """What was refused and why. Each is staged beside its place and then renamed: no link of a prepared tree is followed."""
    refused: list[str] = []
    left = files.MAX_OUT_BYTES
    for number, entry in enumerate(entries):
        if number >= MAX_FILES:
            return [*refused, *(f"not copied out: {e.path[:200]!r}: over {MAX_FILES} files" for e in entries[number:])]
        try:
            out, parts = where(entry)
            left -= await _file_out(box, entry, out, parts, left)
            advance(entry.size)
        except (files.Unsafe, FileFault, InvalidInput, NotFound, OSError) as e:
            refused.append(f"not copied out: {entry.path[:200]!r}: {e}")
    return refused


async def _file_out(box: AsyncSandbox, entry: Entry, out: Path, parts: tuple[str, ...], limit_bytes: int) -> int:
    if entry.type != "file":
        raise files.Unsafe(f"a {entry.type}, not a plain file")
    staging = Path(tempfile.mkdtemp(prefix=".fumehood-", dir=out))
    try:
        staged = staging / "file"
        await box.files.download(entry.path, staged, limit_bytes=limit_bytes)
        size = staged.stat().st_size
        files.place(out, parts, staged)
        return size
    finally:
        shutil.rmtree(staging)


@contextmanager
def _progress(name: str, total: int) -> Generator[Callable[[int], object]]:
    """Bytes that are done go in; a bar on a terminal for what takes long enough to be watched."""
    if total < _BIG_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(name), total=total)
        yield lambda done: bar.advance(task, done)
