"""sys.stdout and sys.stderr that write through to real descriptors, in order with what subprocesses write there."""

from __future__ import annotations

import io
import select
from typing import Any


class _Whole(io.FileIO):
    """Unbuffered, but never short: a signal handler may cut write(2), and TextIOWrapper would drop the rest."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            written = super().write(view)
            if written is None:  # a child made the shared pipe non-blocking, as node does
                select.select([], [self], [])
            view = view[written or 0 :]
        return total


def open_streams(out: int, err: int) -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """Text streams on two descriptors, which stay open when the streams go."""
    return _open(out, "<stdout>"), _open(err, "<stderr>")


def _open(fd: int, name: str) -> io.TextIOWrapper:
    raw: Any = _Whole(fd, "w", closefd=False)
    raw.name = name
    # write_through: a buffer would hold back live output and let a subprocess overtake it.
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
