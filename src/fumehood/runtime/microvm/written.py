"""Pages that every machine of a kind writes to before its first answer. Copied while its guest stands still such a page costs
4 us; copied when the guest writes to it, 30 us more where KVM is emulated (docs/decisions/0009).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Documentation/admin-guide/mm/pagemap.rst: in memory; a page of the file's, so not written to.
_PRESENT, _OF_FILE = 1 << 63, 1 << 61


def pages(pid: int, memory: str) -> bytes:
    """Of the file `memory`, which `pid` has mapped privately, what it has written to: offset and length of each run, as u64."""
    found = array("Q")
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end, offset in _mappings(pid, memory):
            entries = array("Q", os.pread(pagemap.fileno(), (end - start) // PAGE_BYTES * 8, start // PAGE_BYTES * 8))
            for number, entry in enumerate(entries):
                if not entry & _PRESENT or entry & _OF_FILE:
                    continue
                at = offset + number * PAGE_BYTES
                if found and sum(found[-2:]) == at:
                    found[-1] += PAGE_BYTES
                else:
                    found.extend((at, PAGE_BYTES))
    return found.tobytes()


def copy(pid: int, memory: str, base: int, runs: bytes) -> None:
    """Gives `pid`, whose guest does not run yet, copies of its own of those pages of `base`. Raises OSError; ValueError for
    runs that are none.
    """
    numbers = array("Q", runs)
    mappings = list(_mappings(pid, memory))
    with open(f"/proc/{pid}/mem", "wb", buffering=0) as own:
        for at, length in zip(numbers[::2], numbers[1::2], strict=True):
            for start, end, offset in mappings:
                if offset <= at < offset + end - start:
                    os.pwrite(own.fileno(), os.pread(base, length, at), start + at - offset)


def _mappings(pid: int, memory: str) -> Iterator[tuple[int, int, int]]:
    """(start, end, offset in the file) of each: a machine of more than 3 GiB has two, around its devices."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, access, offset, _, _, *path = line.split(maxsplit=5)
        if access == "rw-p" and path and path[0].endswith(f"/{memory}"):
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16), int(offset, 16)
