"""Memory that a fork shares is made the process's own before a machine is snapshotted."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fumehood.agent import pages

pytestmark = pytest.mark.rootless
SIZE_BYTES = 8 << 20


def _shared_bytes() -> int:
    """Anonymous memory that another process has, too."""
    text = Path("/proc/self/smaps").read_text()
    areas = [area for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.M) if " rw-p " in area]
    return sum(int(kib) << 10 for area in areas for kib in re.findall(r"Shared_Dirty:\s+(\d+)", area))


def test_a_fork_that_owned_its_pages_shares_none_with_its_parent() -> None:
    filler = b"x" * SIZE_BYTES
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = _shared_bytes()
        pages.own()
        os.write(writer, f"{before} {_shared_bytes()}".encode())
        os._exit(0)
    os.close(writer)
    before, after = map(int, os.read(reader, 100).split())
    os.close(reader)
    assert os.waitpid(pid, 0)[1] == 0 and len(filler) == SIZE_BYTES
    assert before > SIZE_BYTES > 100 * after
