"""What a verb shows: guest text made harmless for a terminal, and tables, sizes and times for people."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# A terminal obeys its input: guest text could set the clipboard (OSC 52) or make the terminal type. Colours may stay.
_UNSAFE = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x07\x0b-\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def write(stream: Any, text: str) -> None:
    """Guest text as it is into a pipe or file, harmless onto a terminal."""
    with unread_is_fine(stream):
        stream.write(harmless(text) if stream.isatty() else text)
        stream.flush()


def raw(stream: Any, data: bytes) -> None:
    """Guest bytes as they are: into a pipe or file, or onto a terminal that is the guest's for the time being."""
    with unread_is_fine(stream):
        view = memoryview(data)
        while view:
            view = view[os.write(stream.fileno(), view) :]


@contextmanager
def unread_is_fine(stream: Any) -> Generator[None]:
    """Around what writes to `stream`."""
    try:
        yield
    except BrokenPipeError:  # the reader left (`| head`); the program goes on, unread
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def harmless(text: str) -> str:
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def word(value: object) -> str:
    """For one cell or line: a name or a cause that a caller chose holds no control characters, not even a line break."""
    return "" if value is None else _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print it: aligned on a terminal, separated by tabs and without a head elsewhere, for `cut` and `while read`."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(word(cell) for cell in row))
        return
    from rich.console import Console

    Console().print(grid(columns, rows))


def grid(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    drawn = Table(*(Column(name, overflow="fold") for name in columns), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        drawn.add_row(*(Text(word(cell)) for cell in row))  # Text, not markup: a caller's metadata may hold [tags]
    return drawn


def span(seconds: float) -> str:
    """`8s`, `5m`, `2h`, `3d`: the largest unit that fits."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if abs(seconds) >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def ago(at: float | None, now: float | None = None) -> str:
    """How long since `at`, in Unix seconds."""
    return "" if at is None else span(max(0.0, (time.time() if now is None else now) - at))


def clock(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
