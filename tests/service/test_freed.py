"""A server that lives for months holds what it needs, not what it once needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from opened import opened, until

from fumehood.model import MIB

pytestmark = pytest.mark.rootless
BLOCKS, BLOCK_BYTES, KEPT_OF = 20_000, 4_000, 10  # of which nine lie between two that stay: holes that glibc would keep


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_memory_that_was_freed_goes_back_to_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fumehood.service.chronicle._PRUNE_EVERY_S", 0.1)
    blocks = [os.urandom(BLOCK_BYTES) for _ in range(BLOCKS)]
    kept = blocks[::KEPT_OF]
    del blocks
    before = rss_bytes()
    async with opened(tmp_path, "fake"):
        await until(lambda: rss_bytes() < before - 40 * MIB, "the holes are still held")
    assert len(kept) == BLOCKS // KEPT_OF
